"""Controls of an evaluation: what each one is, on planted activations, and through the command on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, TaskConfig, evaluate
from saelab.evaluation.controls import (
    CONTROLS,
    ControlConfig,
    frozen_dictionary,
    measure_controls,
    random_directions,
    raw_channels,
    untrained,
)
from saelab.evaluation.report import control_rows
from saelab.evaluation.tasks.labels import share_reaching
from saelab.runs import Run
from saelab.runs.card import model_card
from saelab.sae import Normalised, build
from saelab.training import TrainConfig, fit_steps, train
from tests.planted import activations
from tests.tiny_lm import save_gpt2, save_llama, sentences

VARIANTS = {"topk": {"k": 4}, "abs_topk": {"k": 4}, "batch_topk": {"k": 4}, "matching_pursuit": {"n_steps": 4}}
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return ActivationCache.from_tensors(tmp_path_factory.mktemp("c") / "cache", activations(1500, 16), held_out=0.2)


def fvu(sae, cache) -> float:
    return evaluate(sae, cache, config=EvaluateConfig(density_tokens=0))["fvu"]


@pytest.mark.parametrize("variant", [*VARIANTS, "relu", "jump_relu", "gated", "matryoshka", "feature_choice"])
def test_an_untrained_sae_reconstructs_worse_than_a_trained_one(cache: ActivationCache, variant: str) -> None:
    torch.manual_seed(5)
    sae = build(variant, 16, 40, **VARIANTS.get(variant, {}))
    train(sae, cache, TrainConfig(epochs=4, batch_size=100, lr=3e-3))
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    control = untrained(sae, cache)
    assert control.config == sae.config and not control.training
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert fvu(control, cache) > fvu(sae, cache)
    torch.testing.assert_close(control.W_dec.norm(dim=1), torch.ones(40), rtol=1e-5, atol=1e-5)
    again = untrained(sae, cache)
    assert torch.equal(again.W_dec, control.W_dec)
    assert not torch.equal(untrained(sae, cache, seed=1).W_dec, control.W_dec)


@pytest.mark.parametrize("variant", ["topk", "abs_topk"])
def test_channels_and_directions_use_as_many_latents_as_the_sae(cache: ActivationCache, variant: str) -> None:
    sae = build(variant, 16, 40, k=4)
    x = next(cache.head(200, 200)).acts
    channels = raw_channels(sae, cache, 4.0)
    assert channels.d_sae == (16 if sae.signed else 32)
    y = (x - x.new_tensor(cache.manifest.mean)).abs()
    want = y.topk(4, dim=1).values.square().sum(1)  # the energy of the four largest deviations
    code = channels.encode(x)
    got = torch.zeros(200).index_add_(0, code.rows(), code.values.detach().square())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # orthogonal axes need no factor
    for control in (channels, random_directions(sae, cache, 4.0)):
        assert 0 < fvu(control, cache) < 1  # the scale of its values is fitted
    directions = random_directions(sae, cache, 4.0)
    assert directions.d_sae == 40
    # They lie where the data do: a tenth of the variance of white directions off the data's own subspace.
    cov = torch.cov((x - x.mean(0)).T)
    along = lambda W: float(torch.einsum("ij,jk,ik->i", W, cov, W).mean())  # noqa: E731
    white = torch.nn.functional.normalize(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert along(directions.W_dec.detach()) > 1.2 * along(white)


def test_a_frozen_dictionary_is_trained_as_the_run_was_and_read_the_next_time(cache, tmp_path: Path) -> None:
    config = TrainConfig(epochs=4, batch_size=100, lr=3e-3)
    torch.manual_seed(0)
    sae = build("topk", 16, 40, k=4)
    for _ in fit_steps(sae, cache, config, tmp_path / "run"):
        pass
    config = config.resolved(sae, cache)
    control = frozen_dictionary(sae, cache, tmp_path / "control", config)
    assert fvu(sae, cache) < fvu(control, cache) < fvu(untrained(sae, cache), cache)
    stamp = (tmp_path / "control" / "cfg.json").stat().st_mtime_ns
    again = frozen_dictionary(sae, cache, tmp_path / "control", config)
    assert (tmp_path / "control" / "cfg.json").stat().st_mtime_ns == stamp
    torch.testing.assert_close(again.W_dec, control.W_dec)
    other = frozen_dictionary(sae, cache, tmp_path / "control", replace(config, seed=7))  # trained again
    assert not torch.equal(other.W_dec, control.W_dec)


def test_what_cannot_be_made_says_why(cache: ActivationCache, tmp_path: Path) -> None:
    """An SAE without a run's description, of a cache whose model is unknown."""
    sae = build("topk", 16, 40, k=4).eval()
    tasks = TaskConfig(("two-sided", "labels"))
    found = measure_controls(sae, cache, 4.0, EvaluateConfig(), tasks, ControlConfig(True), folder=tmp_path)
    assert list(found) == list(CONTROLS)
    for name in ("frozen_dictionary", "random_transformer"):
        assert "run.json" in found[name]["cannot"]
    assert "no vocabulary" in found["untrained"]["tasks"]["labels"]["cannot"]
    assert found["untrained"]["metrics"]["fvu"]["value"] > 0
    with pytest.raises(UserError, match="untrained"):
        ControlConfig(True, ("untraind",))
    wrapped = Normalised(sae).eval()
    found = measure_controls(wrapped, cache, 4.0, EvaluateConfig(), TaskConfig(()), ControlConfig(True))
    cannot = {name for name, control in found.items() if "normalised activations" in control.get("cannot", "")}
    assert cannot == {"untrained", "frozen_dictionary", "random_transformer"}


@pytest.mark.parametrize("save_model", [save_llama, save_gpt2], ids=["llama", "gpt2"])
def test_the_command_sets_every_number_beside_its_controls(tmp_path: Path, capsys, save_model) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": sentences(80, seed)}) for seed in range(16)), encoding="utf-8")
    model, run = save_model(tmp_path / "model"), tmp_path / "run"
    data = ["--text", str(text), "--hook", HOOK, "--context-length", "16", "--tokens", "2000", "--held-out", "0.3"]
    main(["harvest", "--out", str(tmp_path / "cache"), "--model", str(model), *data])
    main(["train", str(tmp_path / "cache"), "--out", str(run), "--d-sae", "48", "--k", "4", "--epochs", "4",
          "--batch-size", "128"])  # fmt: skip
    capsys.readouterr()
    args = ["evaluate", str(run), "--cache", str(tmp_path / "cache"), "--lm-tokens", "200", "--tasks", "labels"]
    main([*args, "--controls"])
    shown = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["controls"]) == list(CONTROLS)
    assert not [name for name, content in found["controls"].items() if "cannot" in content]
    rows = {row.name: row for row in control_rows(found)}
    for name in ("fvu", "l0", "labels mean_f1", "labels share_above_half"):
        assert set(rows[name].controls) == set(CONTROLS), name
        assert name in shown
    assert set(rows["kl_div_with_sae"].controls) == set(CONTROLS) - {"random_transformer"}
    assert rows["fvu"].value < min(rows["fvu"].controls[name] for name in ("untrained", "frozen_dictionary"))
    for name in ("random_directions", "raw_channels"):
        assert rows["l0"].controls[name] == pytest.approx(4, abs=0.01)
    assert sorted(path.name for path in (run / "controls").iterdir()) == ["frozen_dictionary", "random_transformer"]
    assert list(Run.scan(tmp_path)) == ["run"]  # controls are no runs of their own
    card = model_card(Run.open(run))
    assert "## Controls" in card and "frozen dictionary" in card
    quantiles = found["controls"]["untrained"]["tasks"]["labels"]["f1_quantiles"]
    assert share_reaching(quantiles, 0.0) == 1.0
    assert share_reaching(quantiles, 1.01) == 0.0
