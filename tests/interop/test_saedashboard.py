"""A feature index as SAEDashboard's batches: what they say, and that SAEDashboard's own classes accept them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saelab import ActivationCache, build
from saelab.cli import main
from saelab.errors import UserError
from saelab.features import FeatureIndex, IndexConfig, LogitLens, build_index
from saelab.features.saedashboard import write_dashboard
from saelab.sae import SAE
from saelab.sae.weights import save

D_IN, D_SAE = 8, 160


@pytest.fixture
def made(tmp_path: Path) -> tuple[FeatureIndex, SAE, ActivationCache, LogitLens]:
    """A signed SAE with more latents than fit into one file, indexed with a vocabulary and a logit lens."""
    words = [f" w{i}" for i in range(30)]
    tokens = torch.randint(0, 30, (1200,))
    where = {"hook_name": "blocks.3.hook_resid_post", "model": "tiny", "text": "words"}
    cache = ActivationCache.from_tensors(
        tmp_path / "cache", torch.randn(1200, D_IN), tokens, context_length=20, vocabulary=words, **where
    )
    sae = build("abs_topk", D_IN, D_SAE, k=3).eval()
    save(sae, tmp_path / "run", {"hook_name": where["hook_name"], "model_name": "tiny"})
    lens = LogitLens(torch.randn(D_IN, 30))
    index = build_index(sae, cache, tmp_path / "run", lens=lens, config=IndexConfig(top=4))
    return index, sae, cache, lens


def features(folder: Path) -> dict[int, dict]:
    batches = [json.loads(path.read_text()) for path in sorted(folder.glob("batch-*.json"))]
    return {feature["feature_index"]: feature for batch in batches for feature in batch["features"]}


def test_bundle_says_what_the_index_says(made: tuple, tmp_path: Path) -> None:
    index, sae, cache, lens = made
    folder = write_dashboard(index, sae, tmp_path / "out", cache=cache, lens=lens)
    found = features(folder)
    table = index.table()
    fires = {(row.latent, row.pole) for row in table.itertuples() if row.count > 0}
    assert found.keys() == {j if pole > 0 else j + D_SAE for j, pole in fires}
    skipped = json.loads((folder / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert sorted([*found, *skipped]) == list(range(2 * D_SAE))
    for latent, pole in list(fires)[:20]:
        feature, known = found[latent if pole > 0 else latent + D_SAE], index.latent(latent, pole)
        row = pole * sae.W_dec[latent]
        assert feature["vector"] == pytest.approx(row.tolist())
        assert feature["pos_str"] == known["promoted"]
        best = int(lens.effects(row[None])[0].argmax())
        assert feature["pos_str"][0] == f" w{best}"
        assert feature["frac_nonzero"] == known["density"] == known["count"] / 1200
        assert sum(feature["freq_hist_data_bar_heights"]) == known["count"]
        assert sum(feature["logits_hist_data_bar_heights"]) == 30
        top = [a for a in feature["activations"] if a["bin_contains"] == -1]
        assert len(top) == min(4, known["count"])
        first = top[0]
        assert first["values"][first["qualifying_token_index"]] == pytest.approx(known["max"], abs=1e-3)
        assert all(value >= 0 for value in first["values"])
        # The window is the text of the cache, and the pole's activations on it.
        example = index.examples(latent, pole, "top")[0]
        assert "".join(first["tokens"]) == example.text
        focus = cache.read([example.row]).acts
        assert pole * sae.encode(focus).dense()[0, latent].item() == pytest.approx(known["max"], rel=1e-5)
        assert feature["n_prompts_total"] == 60 and feature["dataset"] == "words"


def test_saedashboards_own_classes_accept_it(made: tuple, tmp_path: Path) -> None:
    theirs = pytest.importorskip(
        "sae_dashboard.neuronpedia.neuronpedia_dashboard", reason="SAEDashboard is missing; run `make test-interop`"
    )
    config = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_runner_config").NeuronpediaRunnerConfig
    index, sae, cache, lens = made
    folder = write_dashboard(index, sae, tmp_path / "out", cache=cache, lens=lens)
    files = sorted(folder.glob("batch-*.json"))
    assert len(files) > 1
    for path in files:
        content = json.loads(path.read_text())
        batch = theirs.NeuronpediaDashboardBatch(**content)
        assert batch.to_dict() == content
        empty = theirs.NeuronpediaDashboardFeature().to_dict()
        for feature in content["features"]:
            # The same fields with the same types as the class' own, and complete.
            assert feature.keys() == empty.keys()
            assert {k: type(v) for k, v in feature.items()} == {
                k: float if k == "frac_nonzero" else type(v) for k, v in empty.items()
            }
            assert all(len(a["tokens"]) == len(a["values"]) for a in feature["activations"])
    settings = config(**json.loads((folder / "run_settings.json").read_text()))
    assert settings.n_tokens_in_prompt == 20 and settings.layer == 3


def test_bundle_from_the_command_line(made: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(tmp_path / "run"), tmp_path / "out"
    main(["convert", run, str(out), "--to", "saedashboard", "--latents", "7"])
    assert "SAEDashboard" in capsys.readouterr().out
    assert features(out).keys() <= {*range(7), *range(D_SAE, D_SAE + 7)}
    assert all(feature["logits_hist_data_bar_values"] == [] for feature in features(out).values())
    with pytest.raises(SystemExit) as left:
        main(["convert", run, str(out), "--to", "saedashboard"])
    assert left.value.code == 2


def test_an_index_of_another_sae_is_refused(made: tuple, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use its own"):
        write_dashboard(made[0], build("topk", D_IN, 12, k=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
