"""Every variant ends at the L0 that was asked for: budgets by construction, penalties by a controller."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Literal

import pytest
import torch

from saelab import load
from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.data.synthetic import Planted
from saelab.errors import UserError
from saelab.sae import SAE, VARIANTS, LinearSAE, build
from saelab.sae.controller import CLIP, GAIN, SMOOTHING, L0Controller, shift_to
from saelab.sae.jump_relu import ENCODER_START
from saelab.sae.penalty import PenaltySAE
from saelab.sae.weights import load_metadata
from saelab.sweep import measure, run_sweep
from saelab.sweep.grid import make_grid
from saelab.sweep.halving import losers
from saelab.sweep.runner import Member
from saelab.training import TrainConfig, fit_steps, read_run, train_steps
from saelab.training.checkpoints import latest_step, load_step
from tests.hardening.place import refused
from tests.planted import contents

D_IN, D_SAE, L0 = 16, 64, 5.0
PENALTIES = sorted(name for name, cls in VARIANTS.items() if issubclass(cls, PenaltySAE))
every_penalty = pytest.mark.parametrize("name", PENALTIES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    x, _ = Planted(D_IN, 40, l0=3, zipf=0.3, noise=0.03, seed=1).sample(16_000, seed=2)
    return ActivationCache.from_tensors(tmp_path_factory.mktemp("l0") / "cache", x, held_out=0.2)


def fresh(name: str, l0: float = L0, **config) -> PenaltySAE:
    torch.manual_seed(0)
    sae = build(name, D_IN, D_SAE, l0=l0, **config)
    assert isinstance(sae, PenaltySAE)
    return sae


def l0_of(sae: SAE, x: torch.Tensor) -> float:
    with torch.no_grad():
        return sae.encode(x).l0().double().mean().item()


def split(cache: ActivationCache, name: Literal["train", "held_out"]) -> torch.Tensor:
    return torch.cat([batch.acts for batch in cache.batches(1600, split=name, seed=None)])


@every_penalty
@pytest.mark.parametrize("lr", [3e-3, 6e-3, 1.2e-2])
def test_a_short_run_ends_at_the_l0_asked_for(name: str, lr: float, cache: ActivationCache) -> None:
    sae = fresh(name)
    steps = list(train_steps(sae, cache, TrainConfig(epochs=2, batch_size=128, lr=lr)))
    assert len(steps) == 200 and steps[0].l0 > 4 * L0
    assert l0_of(sae, split(cache, "held_out")) == pytest.approx(L0, rel=0.05)
    # The controller has done it, the shift at the end only the rest.
    assert sae.control is not None and sae.remarks() == []
    assert sae.control.trained.item() == pytest.approx(L0, rel=0.1)
    assert math.fsum(step.l0 for step in steps[-20:]) / 20 == pytest.approx(L0, rel=0.1)


def test_the_encoder_of_jump_relu_begins_shorter_than_the_decoder_in_its_directions() -> None:
    for name in VARIANTS:
        sae = build(name, D_IN, D_SAE)
        if isinstance(sae, LinearSAE):
            start = ENCODER_START if name == "jump_relu" else 1.0
            torch.testing.assert_close(sae.W_enc, start * sae.W_dec.T)
    assert ENCODER_START == 0.3


@every_penalty
def test_without_l0_nothing_is_controlled_and_nothing_new_is_saved(name: str) -> None:
    sae = build(name, D_IN, D_SAE)
    assert isinstance(sae, PenaltySAE) and "l0" not in sae.config
    assert not any("control" in key for key in sae.state_dict())
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    sae.calibrate([torch.randn(64, D_IN)])
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


@every_penalty
@pytest.mark.parametrize("l0", [1.0, 2.5, 12.0])
def test_the_last_shift_is_exact_on_its_sample(name: str, l0: float) -> None:
    sae, x = fresh(name, l0), torch.randn(999, D_IN)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.rand(parameter.shape))
    sae.eval()
    values = sae.encode(x).dense()
    sae.calibrate([x[:400], x[400:]])
    assert round(l0_of(sae, x) * 999) == round(l0 * 999)
    assert sae.control is not None and sae.control.reached.item() == pytest.approx(l0, abs=1e-3)
    assert sae.control.trained.item() == pytest.approx((values != 0).sum().item() / 999)
    if name != "relu":  # its bias is part of the values, those of the others stay as they are
        both = (values != 0) & (sae.encode(x).dense() != 0)
        torch.testing.assert_close(sae.encode(x).dense()[both], values[both])


def test_a_shift_looks_deeper_where_one_chunk_has_most_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.sae.controller.BLOCK", 10 * D_SAE)
    x = torch.rand(50, D_SAE)
    x[:10] += 5
    shift = shift_to(9, x, D_SAE, torch.flatten)
    assert (x > shift.cut).sum() == 450 and shift.after == 9 and shift.before == D_SAE
    assert (x[:10] > shift.cut).sum() == 450, "more than four times the mean of a chunk"


def test_a_small_error_of_a_bias_is_left_alone() -> None:
    x = torch.randn(2000, D_IN)
    for factor, moved in ((1.005, False), (1.02, True)):
        torch.manual_seed(0)
        sae = build("relu", D_IN, D_SAE, l0=8)
        assert isinstance(sae, PenaltySAE) and sae.control is not None
        here = l0_of(sae.eval(), x)
        sae.control.l0 = here * factor
        sae.calibrate([x])
        assert bool(sae.b_enc.any()) == moved


def test_the_controller_follows_its_formula() -> None:
    control, steps = L0Controller(4, 100, start=0.1), 1000
    seen = [60.0, 50.0, 20.0, 0.0, 3.0]
    first, s, i = math.log(60), 0.0, math.log(0.1)
    for step, l0 in enumerate(seen, 1):
        control.observe(torch.tensor(l0))
        control.update(step, steps, 0.004)
        wanted = math.exp(math.log(4) + max(0.0, 1 - step / 4) * (first - math.log(4)))
        e = min(CLIP, max(-CLIP, math.log(max(l0, 0.004) / wanted)))
        s += min(1.0, 1 / (SMOOTHING * steps)) * (e - s)
        i += GAIN / steps * s
        assert control.factor().item() == pytest.approx(math.exp(i + s), rel=1e-12)


def test_processes_that_share_a_batch_keep_one_controller() -> None:
    """What is averaged over them is the batch's L0; the logarithm comes after."""
    whole, parts = L0Controller(4, 100), [L0Controller(4, 100) for _ in range(2)]
    for step, halves in enumerate([(60.0, 20.0), (3.0, 11.0), (0.0, 2.0)], 1):
        whole.observe(torch.tensor(sum(halves) / 2))
        for part, l0 in zip(parts, halves):
            part.observe(torch.tensor(l0))
        for name, buffer in whole.named_buffers():
            mean = (parts[0].get_buffer(name) + parts[1].get_buffer(name)) / 2
            for part in parts:
                part.get_buffer(name).copy_(mean)
            torch.testing.assert_close(buffer, mean)
        for control in (whole, *parts):
            control.update(step, 10, 0.1)


@every_penalty
def test_resuming_is_bit_exact(name: str, cache: ActivationCache, tmp_path: Path) -> None:
    config = TrainConfig(epochs=1, batch_size=400, lr=1e-2)  # 32 steps
    for folder, stops in (("whole", [None]), ("parts", [7, 20, None])):
        for stop in stops:
            steps = fit_steps(fresh(name), cache, config, tmp_path / folder, resume=stop != stops[0])
            for metrics in steps:
                if metrics.step == stop:
                    steps.close()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_an_l0_that_is_not_reached_is_said_with_the_nearest(cache: ActivationCache, tmp_path: Path) -> None:
    """Where the magnitude behind a gate is negative no gate makes a latent active, so 60 of 64 are too many."""
    for _ in fit_steps(fresh("gated", 60), cache, TrainConfig(epochs=1, batch_size=512), tmp_path / "run"):
        pass
    sae = load(tmp_path / "run")
    (remark,) = sae.remarks()
    reached = l0_of(sae, split(cache, "train"))
    assert remark == f"l0=60 was not reached, the nearest is {reached:.3g}; ask for that, or widen the SAE"
    assert reached < 40
    assert load_metadata(tmp_path / "run")["remarks"] == [remark]


def test_a_run_too_short_to_get_there_is_said(cache: ActivationCache) -> None:
    sae = fresh("relu", 2)
    for _ in train_steps(sae, cache, TrainConfig(epochs=1, batch_size=2000, lr=1e-4)):
        pass
    (remark,) = sae.remarks()
    assert remark.startswith("training ended at L0 3") and "shifted to l0=2" in remark


@pytest.mark.parametrize(
    ("variant", "config", "message"),
    [
        ("relu", {"l0": 65}, r"l0=65 is not above 0 and at most d_sae=64; lower l0"),
        ("jump_relu", {"l0": 0}, "l0=0 is not above 0"),
        ("gated", {"l0": 5, "target_l0": 6}, "l0=5 and target_l0=6 both set the weight"),
        ("topk", {"l0": 65}, r"k=65 is outside 1..d_sae=64"),
        ("topk", {"l0": 5, "k": 6}, "l0=5 and k=6 are the same option of topk; give one of them"),
        ("topk", {"l0": 2.5}, "l0=2.5 must be a whole number for topk"),
        ("matching_pursuit", {"l0": 5, "n_steps": 6}, "l0=5 and n_steps=6 are the same option"),
    ],
)
def test_impossible_numbers_are_refused(variant: str, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(variant, D_IN, D_SAE, **config)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_l0_is_understood_by_every_variant(name: str) -> None:
    assert build(name, D_IN, D_SAE, l0=7).config[VARIANTS[name].l0_option] == 7


def test_the_command_line_takes_one_name_for_all(
    cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(variant: str, *more: str) -> list[str]:
        shape = ["--d-sae", "64", "--batch-size", "512", "--epochs", "1", "--device", "cpu"]
        return ["train", str(cache.path), "--variant", variant, "--out", str(tmp_path / variant), *shape, *more]

    main(command("batch_topk", "--l0", "2.5"))
    main(command("matching_pursuit", "--l0", "3", "--n-steps", "3"))
    main(command("relu", "--l0", "60", "--lr", "1e-6"))
    main(command("gated"))
    said = " ".join(capsys.readouterr().err.split())
    assert "training ended at L0 3" in said and "l0=60" in said
    configs = {name: load_metadata(tmp_path / name)["saelab"]["config"] for name in ("batch_topk", "relu", "gated")}
    assert (configs["batch_topk"]["k"], configs["relu"]["l0"]) == (2.5, 60) and "l0" not in configs["gated"]
    assert "l0=3 and k=4 are the same option" in refused(command("topk", "--l0", "3", "--k", "4"), capsys)


def test_fine_tuning_may_ask_for_another_l0(cache: ActivationCache, tmp_path: Path) -> None:
    common = ["--batch-size", "128", "--epochs", "2", "--device", "cpu", "--lr", "3e-3"]
    main(["train", str(cache.path), "--variant", "gated", "--out", str(tmp_path / "a"), "--d-sae", "64", *common])
    start = str(tmp_path / "a")
    for out, l0 in (("b", "5"), ("c", "8")):
        main(["train", str(cache.path), "--from", start, "--out", str(tmp_path / out), "--l0", l0, *common])
        assert l0_of(load(tmp_path / out), split(cache, "held_out")) == pytest.approx(float(l0), rel=0.05)
        start = str(tmp_path / out)
    main(["train", str(cache.path), "--from", start, "--out", str(tmp_path / "d"), "--l0", "None", *common])
    assert not any("control" in key for key in load(tmp_path / "d").state_dict())


def test_the_checkpoint_holds_the_controller(cache: ActivationCache, tmp_path: Path) -> None:
    sae = fresh("relu")
    steps = fit_steps(sae, cache, TrainConfig(epochs=1, batch_size=512), tmp_path / "run")
    for metrics in steps:
        if metrics.step == 5:
            steps.close()
    step = latest_step(tmp_path / "run")
    assert step is not None and sae.control is not None
    weights, _, _ = load_step(step, copy.deepcopy(sae))
    assert weights["control.integral"] == sae.control.integral != 0
    assert (read_run(tmp_path / "run") or {})["config"]["l0"] == L0


def test_a_sweep_compares_all_variants_at_equal_l0(cache: ActivationCache, tmp_path: Path) -> None:
    variants = ["topk", "jump_relu", "gated", "matching_pursuit"]
    block = {"variant": variants, "d_sae": 64, "l0": [3, 6], "lr": 6e-3}
    grid = make_grid({"train": {"epochs": 1, "batch_size": 128}, "grid": [block]})
    assert [entry.name for entry in grid.entries[:3]] == ["topk_l0-3", "topk_l0-6", "jump_relu_l0-3"]
    assert [entry.options for entry in grid.entries[::2]] == [{"k": 3}, {"l0": 3}, {"l0": 3}, {"n_steps": 3}]
    members = []
    for members in run_sweep(grid, cache, tmp_path / "sweep"):  # noqa: B007 - the last ones are measured
        pass
    rows = measure(members, cache)
    assert [row["asked_l0"] for row in rows] == [3, 6] * 4
    for row in rows:
        if row["variant"] in {"jump_relu", "gated"}:
            assert row["l0"] == pytest.approx(row["asked_l0"], rel=0.05), row["name"]
        else:
            assert row["l0"] <= row["asked_l0"]


def test_a_sweep_says_what_is_off(cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"variant": "gated", "d_sae": 64, "l0": [6, 60]}
    grid = make_grid({"train": {"epochs": 1, "batch_size": 256, "lr": 6e-3}, "grid": [block]})
    members = []
    for members in run_sweep(grid, cache, tmp_path / "sweep"):  # noqa: B007
        pass
    assert [row["message"][:22] for row in measure(members, cache)] == ["", "l0=60 was not reached,"]
    monkeypatch.setattr("saelab.sweep.results.NEAR", 1e-9)
    assert measure(members, cache)[0]["message"].startswith("l0=6 was reached on training tokens; held-out tokens have")


def test_halving_groups_by_l0_whatever_its_name(tmp_path: Path) -> None:
    blocks = [{"variant": "topk", "d_sae": 64, "k": [3, 6]}, {"variant": "gated", "d_sae": 64, "l0": [3, 6]}]
    grid = make_grid({"grid": blocks, "halving": {"at": [0.5]}})
    members = [Member(entry, tmp_path / entry.name) for entry in grid.entries]
    for fvu, member in enumerate(members):
        member.folder.mkdir()
        (member.folder / "metrics.jsonl").write_text(json.dumps({"step": 50, "fvu": fvu}) + "\n")
    assert grid.halving is not None
    assert losers(grid.halving, members, 50, 100) == members[2:]


def test_a_grid_with_two_names_for_one_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"entry 1 of the grid .*l0=3 and k=4 are the same option of topk"):
        make_grid({"grid": [{"variant": "topk", "d_sae": 64, "k": 4, "l0": 3}]})
