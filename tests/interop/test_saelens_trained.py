"""An SAE that SAELens itself trained: loaded, inspected, evaluated, indexed and browsed by us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saelab import ActivationCache, inspect, load
from saelab.cli import main
from saelab.features import FeatureIndex
from saelab.workspace.scan import Workspace

pytestmark = pytest.mark.filterwarnings("ignore")  # other tools' warnings are theirs
D_IN, D_SAE, HOOK = 12, 32, "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(20, D_IN), dim=1)
    active = (torch.rand(4000, 20) < 0.1) * (1 + torch.rand(4000, 20))
    tokens = active.argmax(1)
    words = [f" w{i}" for i in range(20)]
    ActivationCache.from_tensors(
        folder / "cache", 5 * active @ truth, tokens, context_length=20, vocabulary=words, hook_name=HOOK
    )
    return folder


def trained(place: Path, architecture: str) -> Path:
    """Train with SAELens' own trainer on the cache and save with its own writer."""
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed here; run `make test-interop`")
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    cls, config = sae_lens.registry.get_sae_training_class(architecture)
    extra = {"k": 3} if "topk" in architecture else {"l1_coefficient": 0.1} if architecture == "standard" else {}
    if architecture == "matryoshka_batchtopk":
        extra["matryoshka_widths"] = [8, D_SAE]
    torch.manual_seed(1)
    theirs = cls(config(d_in=D_IN, d_sae=D_SAE, normalize_activations="expected_average_only_in", **extra))
    cache = ActivationCache(place / "cache")

    def batches():
        epoch = 0
        while True:
            yield from (batch.acts for batch in cache.batches(200, epoch=epoch, drop_last=True))
            epoch += 1

    options = {"n_batches_for_norm_estimate": 5, "lr": 3e-3, "lr_end": 3e-4}
    theirs = SAETrainer(SAETrainerConfig(40_000, 200, **options), theirs, batches()).fit()
    theirs.cfg.metadata.hook_name = HOOK
    theirs.save_inference_model(place / architecture)
    return place / architecture


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "jumprelu", "matryoshka_batchtopk"])
def test_from_their_trainer_to_our_pages(architecture: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(place, architecture)
    cache = ActivationCache(place / "cache")
    theirs = pytest.importorskip("sae_lens").SAE.load_from_disk(folder)
    ours, x = load(folder), cache.read(range(3900, 4000)).acts
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x).dense(), theirs.encode(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)

    facts = inspect(folder, cache)
    assert (facts["format"], facts["d_sae"], facts["hook"]) == ("saelens", D_SAE, HOOK)
    main(["evaluate", str(folder), "--cache", str(place / "cache"), "--lm-tokens", "0", "--json"])
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    held_out = cache.read(range(*cache.split_rows("held_out"))).acts.double()
    with torch.no_grad():
        error = (held_out - theirs(held_out.float()).double()).square().sum()
    spread = (held_out - held_out.mean(0)).square().sum()
    assert metrics["fvu"]["value"] == pytest.approx(float(error / spread), rel=0.05)  # the mean is the training rows'
    assert metrics["fvu"]["value"] < 0.6, "SAELens did not train"

    main(["index", str(folder), "--cache", str(place / "cache"), "--top", "3"])
    index = FeatureIndex(folder)
    latent = int(index.table()["count"].to_numpy().argmax())
    best = index.examples(latent, kind="top")[0]
    row = cache.read([best.row]).acts
    with torch.no_grad():
        assert best.value == pytest.approx(float(theirs.encode(row)[0, latent]), rel=1e-4)

    run = Workspace.scan(place).run(architecture)
    assert run.is_foreign and run.has_index
