"""A sweep gives each SAE exactly what a run of its own would, whatever happens to the others or to the process."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from saelab.cli import main
from saelab.cli.tables import results_table
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sae import VARIANTS, build
from saelab.sae.weights import load_sae
from saelab.sweep import Halving, Member, load_results, read_grid, run_sweep
from saelab.sweep.grid import check_grid, make_grid
from saelab.sweep.halving import losers
from saelab.training import TrainConfig, fit_steps
from saelab.training.checkpoints import latest_step
from saelab.training.log import recent_fvu
from tests import planted, tiny_lm
from tests.planted import activations, contents
from tests.sweep.running import run

D_IN = 8
TRAIN = {"epochs": 2, "batch_size": 64, "dead_after": 200}  # 2 x 13 steps
GRID = {
    "train": TRAIN,
    "grid": [
        {"variant": ["topk", "batch_topk"], "d_sae": 20, "k": [2, 4], "lr": 1e-2},
        {"variant": "abs_topk", "d_sae": 12, "k": 2, "seed": 3},
    ],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    path = tmp_path_factory.mktemp("sweep") / "cache"
    return ActivationCache.from_tensors(path, activations(960, D_IN), held_out=0.1)


def test_every_variant_passes_the_check_that_allocates_nothing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    acts, grads = torch.randn(400, D_IN, generator=generator), torch.randn(400, D_IN, generator=generator)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts, grads=grads, held_out=0.1)
    check_grid(make_grid({"train": TRAIN, "grid": [{"variant": sorted(VARIANTS), "d_sae": 40}]}), cache)


def test_the_grid_is_multiplied_out_and_named() -> None:
    grid = make_grid(GRID)
    assert [entry.name for entry in grid.entries] == [
        *("topk_k-2_d_sae-20_lr-0.01", "topk_k-4_d_sae-20_lr-0.01"),
        *("batch_topk_k-2_d_sae-20_lr-0.01", "batch_topk_k-4_d_sae-20_lr-0.01"),
        "abs_topk_k-2_d_sae-12_seed-3",
    ]
    assert grid.entries[4].train == TrainConfig(**TRAIN, seed=3)
    assert grid.entries[3].options == {"k": 4} and grid.entries[3].train.lr == 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": [{"variant": "topk", "d_sae": 20, "k": [2, 99]}]},
            r"entry 2 of the grid \(variant=topk, d_sae=20, k=99\): k=99",
        ),
        ({"grid": [{"variant": "topkk", "d_sae": 20}]}, r"entry 1 .*unknown variant 'topkk'.*topk"),
        ({"grid": [{"variant": "topk", "d_sae": 20, "beta": 1.0}]}, r"entry 1 .*beta"),
        ({"grid": [{"variant": "topk", "k": 2}]}, "entry 1 .*has no d_sae"),
        ({"grid": [{"variant": "topk", "d_sae": 20, "epochs": 3}]}, "epochs is shared .* put it under"),
        ({"grid": [{"variant": "topk", "d_sae": 20, "k": 2, "lr": -1.0}]}, "entry 1 .*lr=-1.0 must be positive"),
        ({"grid": [{"variant": "topk", "d_sae": 20, "k": [2, 2]}]}, "lists topk 2 times"),
        ({"grid": []}, r"no \[\[grid\]\] block"),
        ({"train": {"epoch": 3}}, "unknown key 'epoch' in .train.: did you mean epochs"),
        ({"train": {"epochs": 1, "batch_size": 5000}}, "entry 1 .*batch_size=5000 exceeds the 864"),
        ({"halving": {"at": [0.5, 0.2]}}, "must be increasing shares"),
        ({"halving": {"keep": 0.5}}, "needs at ="),
        ({"train": 3}, r"\[train\] must be a table of settings, not 3"),
        ({"grid": [3]}, r"\[\[grid\]\] must be a table of settings, not 3"),
        ({"halving": [0.5]}, r"\[halving\] must be a table"),
        ({"halving": {"at": 0.5}}, r"\[halving\]: at=0.5 must be a list"),
        ({"train": {"epochs": 1.5}}, "entry 1 .*epochs=1.5 must be a whole number"),
        ({"train": {"epochs": True}}, "entry 1 .*epochs=True must be a whole number"),
        ({"train": {"decay": "never"}}, "entry 1 .*decay='never' must be one of 'none', 'linear', 'cosine'"),
        ({"grid": [{"variant": "topk", "d_sae": 20.0, "k": 2}]}, "entry 1 .*d_sae=20.0 must be a whole number"),
        ({"grid": [{"variant": "topk", "d_sae": 20, "k": 2.5}]}, "entry 1 .*k=2.5 must be a whole number"),
        ({"grid": [{"variant": "topk", "d_sae": 20, "k": "2"}]}, "entry 1 .*k='2' must be a whole number"),
        (
            {"grid": [{"variant": "matryoshka", "d_sae": 20, "k": 2, "groups": [["half"]]}]},
            "entry 1 .*groups=.*must be a list .a list of lists",
        ),
        ({"halvings": {}}, "unknown table .halvings. in the grid: did you mean halving"),
    ],
)
def test_an_impossible_grid_is_refused_before_anything_trains(
    cache: ActivationCache, tmp_path: Path, change: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        next(run_sweep(make_grid(GRID | change), cache, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_every_sae_is_the_one_a_run_of_its_own_gives(cache: ActivationCache, tmp_path: Path) -> None:
    members = run(GRID, cache, tmp_path / "sweep")
    assert [m.status for m in members] == ["finished"] * 5
    for entry in make_grid(GRID).entries:
        for _ in fit_steps(entry.build(D_IN), cache, entry.train, tmp_path / "solo" / entry.name):
            pass
        assert contents(tmp_path / "sweep" / entry.name) == contents(tmp_path / "solo" / entry.name)
    of_the_grid = make_grid(GRID).entries[4].build(D_IN)
    torch.manual_seed(3)  # what `saelab train --seed 3` does
    assert torch.equal(of_the_grid.W_dec, build("abs_topk", D_IN, 12, k=2).W_dec)


def test_the_cache_is_read_once(cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, passes = cache.batches, []

    def counted(*args, **options):
        passes.append((options.get("split"), options.get("epoch")))
        return real(*args, **options)

    monkeypatch.setattr(cache, "batches", counted)
    run({**GRID, "grid": GRID["grid"][:1]}, cache, tmp_path / "sweep")
    training = [epoch for split, epoch in passes if split == "train" and epoch is not None]
    assert training == [0, 1]


def test_a_diverging_sae_is_stopped_and_reported_and_the_others_go_on(cache: ActivationCache, tmp_path: Path) -> None:
    block = {"variant": "topk", "d_sae": 20, "k": 2}
    wild = {"train": TRAIN, "grid": [block | {"lr": 1e-2}, block | {"lr": 1e37, "grad_clip": 1e30}]}
    members = run(wild, cache, tmp_path / "sweep")
    assert [m.status for m in members] == ["finished", "diverged"]
    assert "not finite at step" in members[1].message
    calm = run({"train": TRAIN, "grid": [block | {"lr": 1e-2}, block | {"lr": 1e-3}]}, cache, tmp_path / "calm")
    assert contents(members[0].folder) == contents(calm[0].folder)
    again = run(wild, cache, tmp_path / "sweep", resume=True)
    assert [(m.status, m.message) for m in again] == [(m.status, m.message) for m in members]


HALVED = {
    "train": TRAIN,
    "grid": [{"variant": "topk", "d_sae": 20, "k": [2, 4], "lr": [1e-2, 1e-3, 1e-5]}],
    "halving": {"at": [0.25, 0.5], "keep": 0.5, "within": ["k"]},
}


def test_halving_stops_the_worse_of_each_group(cache: ActivationCache, tmp_path: Path) -> None:
    members = run(HALVED, cache, tmp_path / "sweep")
    status = {(m.entry.options["k"], m.entry.train.lr): (m.status, m.step) for m in members}
    for k in (2, 4):
        assert status[k, 1e-2] == ("finished", 26)
        assert status[k, 1e-5] == ("halted", 6)  # round(0.25 * 26)
        assert status[k, 1e-3] == ("halted", 13)
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert {rung: len(names) for rung, names in record["rungs"].items()} == {"6": 2, "13": 2}
    # A halted SAE can be used as it is, and its run can be gone on with alone.
    assert load_sae(latest_step(members[2].folder)).d_sae == 20


def test_halving_compares_equal_numbers_of_active_latents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = [
        ("matching_pursuit", "n_steps", 2),
        ("topk", "k", 2),
        ("matching_pursuit", "n_steps", 4),
        ("topk", "l0", 4),
    ]
    grid = make_grid({"grid": [{"variant": variant, "d_sae": 20, name: n} for variant, name, n in asked]})
    members = [Member(entry, tmp_path / str(number)) for number, entry in enumerate(grid.entries)]
    # More active latents, a smaller error: among all four, only those with four would stay.
    fvus = {members[i].folder: fvu for i, fvu in enumerate((0.4, 0.5, 0.2, 0.1))}
    monkeypatch.setattr("saelab.sweep.halving.recent_fvu", lambda folder, rung, total: fvus[folder])
    assert losers(Halving((0.5,)), members, 5, 10) == [members[1], members[2]]


def test_recent_fvu_is_a_mean_over_the_end_of_the_window(tmp_path: Path) -> None:
    rows = [{"step": step, "fvu": float(step)} for step in range(1, 61)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert recent_fvu(tmp_path, 50, 80) == (47 + 48 + 49 + 50) / 4
    assert losers(make_grid(HALVED).halving, [], 5, 10) == []


def test_a_sweep_stopped_anywhere_resumes_to_the_same_bytes(cache: ActivationCache, tmp_path: Path) -> None:
    grid = tomllib.loads(planted.GRID) | {"train": TRAIN}
    run(grid, cache, tmp_path / "whole", checkpoint_steps=5)
    for stop in (2, 9, 7):  # in the middle, after and before a rung
        run(grid, cache, tmp_path / "parts", stop=stop, resume=True, checkpoint_steps=5)
    run(grid, cache, tmp_path / "parts", resume=True, checkpoint_steps=5)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_resumed_sweep_refuses_another_grid_and_another_cache(cache: ActivationCache, tmp_path: Path) -> None:
    run(GRID, cache, tmp_path / "sweep", stop=3)
    with pytest.raises(UserError, match="begun with another grid"):
        run(HALVED, cache, tmp_path / "sweep", resume=True)
    other = ActivationCache.from_tensors(tmp_path / "other", torch.randn(960, D_IN), held_out=0.1)
    with pytest.raises(UserError, match="begun with another cache"):
        run(GRID, other, tmp_path / "sweep", resume=True)


TOML = """
[train]
epochs = 8
batch_size = 64
[[grid]]
variant = ["topk", "abs_topk"]
d_sae = 20
k = 2
[[grid]]
variant = "topk"
d_sae = 20
k = 2
lr = 1e37
grad_clip = 1e30
"""


@pytest.mark.slow
def test_the_command_survives_kill_and_writes_table_and_report(
    cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "grid.toml").write_text(TOML)
    args = ["sweep", str(cache.path), str(tmp_path / "grid.toml"), "--checkpoint-steps", "7", "--out"]
    main([*args, str(tmp_path / "whole"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["finished", "finished", "diverged"]
    assert rows == load_results(tmp_path / "whole")
    for row in rows[:2]:
        evaluation = json.loads((tmp_path / "whole" / row["folder"] / "evaluation.json").read_text())
        assert row["fvu"] == evaluation["metrics"]["fvu"]["value"] and 0 < row["fvu"] < 1
        assert 0 < row["l0"] <= 2 and row["ce_loss_recovered_zero"] is None
    assert rows[2]["fvu"] is None and "not finite" in rows[2]["message"]
    report = (tmp_path / "whole" / "report.html").read_text()
    assert all(row["name"] in report for row in rows) and "Plotly" in report

    code = "import torch, sys; torch.set_num_threads(1); from saelab.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *args, str(tmp_path / "killed"), "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, lines = tmp_path / "killed" / "topk" / "metrics.jsonl", 5 + random.randrange(70)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") > lines) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -9
    main([*args, str(tmp_path / "killed"), "--resume"])
    left, right = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    timed = {n for n in left if n.endswith(("evaluation.json", "report.html", "sweep.parquet", "summary.parquet"))}
    tables = [[row | {"cpu_seconds": None} for row in load_results(tmp_path / n)] for n in ("killed", "whole")]
    assert tables[0] == tables[1]
    assert {n: b for n, b in left.items() if n not in timed} == {n: b for n, b in right.items() if n not in timed}


def test_grid_files_that_are_none(tmp_path: Path, cache: ActivationCache) -> None:
    with pytest.raises(UserError, match="cannot read the grid"):
        read_grid(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(UserError, match="not valid TOML"):
        read_grid(tmp_path / "bad.toml")
    check_grid(make_grid(GRID), cache)
    assert math.isfinite(make_grid(GRID).entries[0].train.lr or 0)


def test_what_cannot_be_measured_is_refused_before_anything_trains(
    tmp_path: Path, cache: ActivationCache, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "grid.toml").write_text(TOML)
    bare = ActivationCache.from_tensors(tmp_path / "bare", torch.randn(200, D_IN), held_out=0.0)
    for path, more, message in (
        (bare.path, [], "no held-out rows"),
        (cache.path, ["--lm-tokens", "-1"], "lm_tokens=-1 must not be negative"),
        (cache.path, ["--lm-tokens", "64"], "lm_tokens=64 needs the language model"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["sweep", str(path), str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), *more])
        assert stop.value.code == 2 and message in capsys.readouterr().err.replace("\n", " ")
        assert not (tmp_path / "out").exists()


def test_another_sweep_is_not_begun_where_one_is(cache: ActivationCache, tmp_path: Path) -> None:
    grid = {"train": TRAIN, "grid": [{"variant": "topk", "d_sae": 20, "k": 2, "lr": 1e-2}]}
    run(grid, cache, tmp_path / "sweep")
    other = {**grid, "train": {**TRAIN, "decay": "cosine"}}  # the SAE has the same name
    with pytest.raises(UserError, match="holds a sweep; continue it with resume, or choose another folder"):
        run(other, cache, tmp_path / "sweep")


@pytest.mark.parametrize("content", ["{", "[]", '{"rungs": {}, "stopped": {}}'])
def test_a_damaged_record_is_named(content: str, cache: ActivationCache, tmp_path: Path) -> None:
    run(GRID, cache, tmp_path / "sweep", stop=3)
    (tmp_path / "sweep" / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json is damaged .* start the sweep again with --overwrite"):
        run(GRID, cache, tmp_path / "sweep", resume=True)


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "blocks.2.hook_resid_pre"])
def test_a_sweep_reports_the_loss_recovered_in_the_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture, hook: str
) -> None:
    model = str(tiny_lm.save_llama(tmp_path / "llama"))
    (tmp_path / "text.txt").write_text(tiny_lm.sentences(600))
    harvest = ["--model", model, "--text", str(tmp_path / "text.txt"), "--hook", hook]
    sizes = ["--tokens", "1600", "--context-length", "16", "--held-out", "0.2"]
    main(["harvest", *harvest, *sizes, "--out", str(tmp_path / "cache")])
    (tmp_path / "grid.toml").write_text(
        '[train]\nepochs = 2\nbatch_size = 64\n[[grid]]\nvariant = "topk"\nd_sae = 32\nk = [1, 8]\nlr = 1e-2\n'
    )
    arguments = ["sweep", str(tmp_path / "cache"), str(tmp_path / "grid.toml"), "--lm-tokens", "160"]
    capsys.readouterr()
    main([*arguments, "--out", str(tmp_path / "sweep"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows == load_results(tmp_path / "sweep")
    for row in rows:
        folder = str(tmp_path / "sweep" / row["folder"])
        main(["evaluate", folder, "--cache", str(tmp_path / "cache"), "--lm-tokens", "160", "--json"])
        alone = json.loads(capsys.readouterr().out)["metrics"]["ce_loss_recovered_zero"]["value"]
        assert row["ce_loss_recovered_zero"] == pytest.approx(alone, rel=1e-6)
        # The model is random: what it loses says nothing, but it is a number, and it differs with the SAE.
        assert math.isfinite(alone)
    assert rows[0]["ce_loss_recovered_zero"] != rows[1]["ce_loss_recovered_zero"]
    shown = render(results_table([row | {"dead_fraction": 0.023} for row in rows]))
    assert f"{rows[0]['ce_loss_recovered_zero']:.4f}" in shown and "2.3%" in shown


def render(table: Any) -> str:
    with (console := Console(width=200)).capture() as captured:
        console.print(table)
    return captured.get()
