"""Fine-tuning goes on from the weights it is given."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saelab import ActivationCache, build, load
from saelab.distributed import Parallel
from saelab.distributed.checkpoint import slices, split_dims
from saelab.distributed.sharding import build_shard
from saelab.sae import SAE, Normalised
from saelab.sae.weights import load_metadata, load_sae, save
from saelab.training import TrainConfig, adopt, fit_steps, train_steps
from tests.hardening.place import call, refused


def test_fine_tuning_starts_where_the_sae_is(tmp_path: Path) -> None:
    truth = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)
    active = (torch.rand(2048, 12) < 0.15) * (1 + torch.rand(2048, 12))
    cache = ActivationCache.from_tensors(tmp_path / "cache", 20 * active @ truth)
    config = TrainConfig(epochs=10, batch_size=128, lr=3e-3)
    sae = build("topk", d_in=8, d_sae=12, k=3)
    trained = list(train_steps(sae, cache, config))[-1]
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    state = adopt(sae, cache)
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())
    again = list(train_steps(sae, cache, TrainConfig(epochs=1, batch_size=128, lr=1e-4, warmup=0.0), state))
    # From scratch the first step has an FVU near 1.
    assert abs(again[0].fvu - trained.fvu) < 0.1
    assert again[-1].fvu < again[0].fvu + 0.05
    assert any(not torch.equal(value, weights[name]) for name, value in sae.state_dict().items())


def fvu_of(sae: SAE, cache: ActivationCache, x: torch.Tensor) -> float:
    """Of one batch, against the variance of the cache, summed in float64."""
    with torch.no_grad():
        return float((x.double() - sae(x).double()).square().sum() / len(x) / cache.manifest.variance)


def planted(folder: Path, size: float) -> ActivationCache:
    """Activations whose norm, and with it the scale that training applies, is far from 1."""
    truth = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)
    active = (torch.rand(2048, 12) < 0.15) * (1 + torch.rand(2048, 12))
    return ActivationCache.from_tensors(folder, size * active @ truth + size)


@pytest.mark.parametrize("size", [0.02, 30.0])
@pytest.mark.parametrize("form", ["sparsify", "saelens", "gemma_scope", "dictionary_learning"])
def test_the_loss_starts_where_the_imported_sae_ends(form: str, size: float, tmp_path: Path) -> None:
    """The first step reports the FVU that the imported SAE has on that batch, summed here in float64."""
    cache = planted(tmp_path / "cache", size)
    assert cache.manifest.scale != 1
    sae = load(foreign(form, size, tmp_path / "theirs"))
    config = TrainConfig(epochs=1, batch_size=256, lr=1e-4, warmup=0.0)
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    expected = fvu_of(sae, cache, next(cache.batches(256, seed=config.data_seed)).acts)
    steps = list(train_steps(sae, cache, config, adopt(sae, cache)))
    # float32 sums of 8 x 256 squares, and a threshold's pre-activations on its edge.
    assert steps[0].fvu == pytest.approx(expected, rel=1e-4)
    assert steps[-1].fvu < expected
    assert any(not torch.equal(value, weights[name]) for name, value in sae.state_dict().items())


def foreign(
    form: str, size: float, folder: Path, architecture: str = "standard", norms: torch.Tensor | None = None
) -> Path:
    """An SAE of moderate quality as another tool stores it, in raw units of activations of that size.

    A SAELens one may have another ``architecture``, and a dictionary with rows of those ``norms``.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    W_dec = torch.nn.functional.normalize(torch.randn(24, 8), dim=1)
    W_enc, b_enc, b_dec = W_dec.T.contiguous(), size * 0.1 * torch.randn(24), torch.full((8,), size)
    linear = {"encoder.weight": W_enc.T.contiguous(), "encoder.bias": b_enc}
    if form == "sparsify":
        save_file({**linear, "W_dec": W_dec, "b_dec": b_dec}, folder / "sae.safetensors")
        (folder / "cfg.json").write_text('{"activation": "topk", "num_latents": 0, "k": 3}')
    elif form == "saelens":
        config = {"architecture": architecture, "d_in": 8, "d_sae": 24, "metadata": {"sae_lens_version": "6.5.0"}}
        tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        if norms is not None:  # the same reconstructions for ReLU and JumpReLU, weaker or stronger ones for gated
            tensors |= {"W_dec": W_dec * norms[:, None], "W_enc": W_enc / norms, "b_enc": b_enc / norms}
        if architecture == "jumprelu":
            tensors["threshold"] = torch.full((24,), size * 0.2)
        if architecture == "gated":
            tensors["b_gate"] = tensors.pop("b_enc")
            tensors |= {"r_mag": 0.1 * torch.randn(24), "b_mag": size * 0.05 * torch.randn(24)}
        save_file(tensors, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(config))
    elif form == "gemma_scope":
        tensors = {"w_enc": W_enc, "b_enc": b_enc - b_dec @ W_enc, "w_dec": W_dec, "b_dec": b_dec}
        save_file({**tensors, "threshold": torch.full((24,), size * 0.2)}, folder / "params.safetensors")
    else:  # a mid-run backup, whose norm factor must be folded in
        state = {**linear, "decoder.weight": W_dec.T.contiguous(), "b_dec": b_dec, "k": torch.tensor(3)}
        state = {key: value / size if key in {"encoder.bias", "b_dec"} else value for key, value in state.items()}
        torch.save({"step": 1, "ae": state, "optimizer": {}, "config": {}, "norm_factor": size}, folder / "ae.pt")
        (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoderTopK"}}')
    return folder


ONE_PASS = ["--epochs", "1", "--batch-size", "256", "--lr", "1e-4", "--warmup", "0", "--device", "cpu"]


@pytest.fixture
def cache(tmp_path: Path) -> ActivationCache:
    return planted(tmp_path / "cache", 30.0)


def tune(cache: ActivationCache, sae: Path, out: Path, *more: str) -> list[str]:
    return ["train", cache.path, "--from", str(sae), "--out", str(out), *ONE_PASS, *more]


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", ["sparsify", "saelens", "gemma_scope", "dictionary_learning"])
def test_the_command_starts_where_the_imported_sae_ends(form: str, cache: ActivationCache, tmp_path: Path) -> None:
    theirs = foreign(form, 30.0, tmp_path / "theirs")
    sae = load(theirs)
    expected = fvu_of(sae, cache, next(cache.batches(256, seed=0)).acts)
    assert call(tune(cache, theirs, tmp_path / "run")) == 0
    steps = logged(tmp_path / "run")
    assert steps[0]["fvu"] == pytest.approx(expected, rel=1e-4)  # as in the test above
    assert steps[-1]["fvu"] < expected
    tuned = load_sae(tmp_path / "run")
    assert (tuned.variant, tuned.config) == (sae.variant, sae.config)
    assert load_metadata(tmp_path / "run")["fine_tuned_from"] == str(theirs)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_norms_of_the_dictionary_are_not_lost(architecture: str, cache: ActivationCache, tmp_path: Path) -> None:
    """Training keeps rows at unit norm; the second step has to be as good as the SAE that was imported."""
    theirs = foreign("saelens", 30.0, tmp_path / "theirs", architecture, 0.3 + 2 * torch.rand(24))
    sae = load(theirs)
    batches = [batch.acts for batch in cache.batches(256, seed=0)][:2]
    expected, x = [fvu_of(sae, cache, acts) for acts in batches], sae(batches[0])
    adopt(sae, cache)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(24))
    torch.testing.assert_close(sae(batches[0]), x, rtol=1e-4, atol=1e-3)  # values near 30, sums of 24
    assert call(tune(cache, theirs, tmp_path / "run", "--penalty-warmup", "1")) == 0
    found = [row["fvu"] for row in logged(tmp_path / "run")]
    # Between the two lies one step of Adam at a rate of 1e-4.
    assert found[0] == pytest.approx(expected[0], rel=1e-4) and found[1] == pytest.approx(expected[1], rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variant", "abs_topk"], "variant=abs_topk differs from variant=topk of the SAE in"),
        (["--d-sae", "48"], "d_sae=48 differs from d_sae=24 of the SAE in"),
        (["--k", "4"], "k=4 differs from k=3 of the SAE in"),
    ],
)
def test_contradictions_are_refused(
    options: list[str], message: str, cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = foreign("sparsify", 30.0, tmp_path / "theirs")
    said = refused(tune(cache, theirs, tmp_path / "run", *options), capsys)
    assert message in said and "leave it out" in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_what_agrees_or_acts_in_training_alone_may_be_said(cache: ActivationCache, tmp_path: Path) -> None:
    theirs = foreign("sparsify", 30.0, tmp_path / "theirs")
    same = ["--variant", "topk", "--d-sae", "24", "--k", "3"]
    assert call(tune(cache, theirs, tmp_path / "run", *same)) == 0
    plain = foreign("saelens", 30.0, tmp_path / "plain")
    assert call(tune(cache, plain, tmp_path / "dense", "--l1", "0")) == 0
    assert call(tune(cache, plain, tmp_path / "sparse", "--l1", "20", "--penalty-warmup", "0")) == 0
    assert load_sae(tmp_path / "sparse").config["l1"] == 20
    assert logged(tmp_path / "sparse")[-1]["l0"] < logged(tmp_path / "dense")[-1]["l0"]


def test_jumps_keep_a_bandwidth_in_the_unit_of_the_data(cache: ActivationCache, tmp_path: Path) -> None:
    sae = load(foreign("gemma_scope", 30.0, tmp_path / "theirs"))
    adopt(sae, cache)
    sae.rescale_(cache.manifest.scale)
    assert sae.bandwidth == sae.config["bandwidth"]


def test_feature_choice_goes_on_in_its_second_phase(cache: ActivationCache, tmp_path: Path) -> None:
    options = ["--variant", "feature_choice", "--k", "3", "--d-sae", "24"]
    assert call(["train", cache.path, "--out", str(tmp_path / "first"), *ONE_PASS, *options]) == 0
    assert call(tune(cache, tmp_path / "first", tmp_path / "run")) == 0
    assert all(row["lr"] >= 0 and row["phase"] == 2 for row in logged(tmp_path / "run"))


@pytest.mark.parametrize("case", ["width", "layer-normed", "itself", "around", "missing"])
def test_impossible_beginnings_are_refused(
    case: str, cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, out = foreign("sparsify", 30.0, tmp_path / "saes" / "theirs"), tmp_path / "run"
    if case == "width":
        cache = ActivationCache.from_tensors(tmp_path / "wide", torch.randn(600, 9))
    elif case == "layer-normed":
        save(Normalised(load(theirs)), theirs := tmp_path / "normed")
    elif case == "missing":
        theirs = tmp_path / "nowhere"
    else:
        out = theirs if case == "itself" else theirs.parent
    said = refused(tune(cache, theirs, out, "--overwrite"), capsys)
    assert {
        "width": "d_in=8 but the cache holds width 9",
        "layer-normed": "cannot be trained",
        "itself": "holds the SAE to start from",
        "around": "holds the SAE to start from",
        "missing": "does not exist",
    }[case] in said
    assert not (tmp_path / "run").exists() and (tmp_path / "saes" / "theirs" / "cfg.json").exists()


def test_another_hook_point_is_remarked_on(
    cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = build("topk", d_in=8, d_sae=12, k=3)
    save(ours, tmp_path / "ours", {"hook_name": "blocks.1.hook_mlp_out"})
    moved = ActivationCache.from_tensors(tmp_path / "moved", torch.randn(600, 8), hook_name="blocks.2.hook_mlp_out")
    assert call(tune(moved, tmp_path / "ours", tmp_path / "run")) == 0
    said = capsys.readouterr().err
    assert "note: it was trained on blocks.1.hook_mlp_out, the cache holds blocks.2.hook_mlp_out" in said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def checkpoint_written() -> None:
    """Wait for the thread that writes: a copy takes a while, in which it would go on."""
    for thread in threading.enumerate():
        if thread.name == "saelab-checkpoint":
            thread.join()


@pytest.mark.parametrize("form", ["sparsify", "saelens", "gemma_scope"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_killed_fine_tuning_goes_on_without_its_source(
    steps: int, form: str, cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed before its first regular checkpoint (``steps`` 1) or after it, and the first SAE is gone by then."""
    theirs = foreign(form, 30.0, tmp_path / "theirs")
    assert call(tune(cache, theirs, tmp_path / "whole")) == 0
    config = TrainConfig(epochs=1, batch_size=256, lr=1e-4, warmup=0.0)
    running = fit_steps(load(theirs), cache, config, tmp_path / "run", source=str(theirs), checkpoint_steps=2)
    for _ in range(steps):
        next(running)
    checkpoint_written()
    shutil.copytree(tmp_path / "run", tmp_path / "killed")  # what a kill at this moment leaves
    running.close()
    shutil.rmtree(theirs)
    resume = ["train", cache.path, "--out", str(tmp_path / "killed"), "--device", "cpu", "--resume"]
    said = refused([*resume, "--from", str(tmp_path / "whole")], capsys)
    assert f"was begun from {theirs}, not from {tmp_path / 'whole'}" in said
    assert call(resume) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_without_its_first_weights_it_does_not_start_from_others(
    cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = foreign("sparsify", 30.0, tmp_path / "theirs")
    config = TrainConfig(epochs=1, batch_size=256, lr=1e-4, warmup=0.0)
    running = fit_steps(load(theirs), cache, config, tmp_path / "run", source=str(theirs))
    next(running)
    checkpoint_written()
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    running.close()
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    resume = ["train", cache.path, "--out", str(tmp_path / "killed"), "--device", "cpu", "--resume"]
    assert "has lost its initial weights" in refused(resume, capsys)


def test_processes_take_their_latents_of_the_first_weights() -> None:
    whole = build("topk", d_in=8, d_sae=24, k=2)
    with torch.no_grad():
        whole.b_enc.normal_()
        whole.b_dec.normal_()
    shards = []
    for rank in range(4):
        parallel = Parallel(dict_size=4, dict_rank=rank)
        shards.append(build_shard("topk", 8, 24, 0, parallel, k=2))
        dims = split_dims(shards[-1].state_dict(), whole.state_dict())
        shards[-1].load_state_dict(slices(whole.state_dict(), dims, parallel))
    for name, dim in {"W_enc": 1, "b_enc": 0, "W_dec": 0}.items():
        joined = torch.cat([shard.state_dict()[name] for shard in shards], dim)
        assert torch.equal(joined, whole.state_dict()[name])
    assert all(torch.equal(shard.b_dec, whole.b_dec) for shard in shards)
