"""Several processes on one sweep: the files of one process alone, whatever dies, halts or has another clock."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.sweep import load_results, make_grid, run_sweep, runner
from saelab.sweep.claims import Claims
from tests import planted
from tests.planted import activations, contents
from tests.sweep.running import run

ROOT = Path(__file__).parents[2]
TRAIN = {"epochs": 2, "batch_size": 64}
HALVED = tomllib.loads(planted.GRID) | {"train": TRAIN}
TUNED = {
    "train": TRAIN,
    "grid": [
        {"variant": "topk", "d_sae": 20, "k": [2, 3], "lr": "tune", "seed": [3, 4]},
        {"variant": "abs_topk", "d_sae": 12, "k": 2, "lr": 1e-2},
        {"variant": "topk", "d_sae": 20, "k": 2, "lr": 1e37, "grad_clip": 1e30},  # diverges
    ],
    "tune": {"factors": [0.02, 0.5], "validation": 0.1},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    path = tmp_path_factory.mktemp("workers") / "cache"
    return ActivationCache.from_tensors(path, activations(960, 8), held_out=0.1, context_length=10)


@pytest.fixture(scope="module")
def alone(cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What one process writes, which trains all SAEs together."""
    folder = tmp_path_factory.mktemp("alone")
    for name, grid in (("halved", HALVED), ("tuned", TUNED)):
        run(grid, cache, folder / name)
    return {name: contents(folder / name) for name in ("halved", "tuned")}


@pytest.mark.parametrize(("name", "grid"), [("halved", HALVED), ("tuned", TUNED)])
def test_workers_in_turn_write_what_one_process_writes(
    name: str, grid: dict, cache: ActivationCache, alone: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WAIT", 0.0)
    sweeps = [run_sweep(make_grid(grid), cache, tmp_path / "sweep", resume=True, at_once=n) for n in (1, 2)]
    finals, last, turns = [], {}, 0
    while sweeps:
        for sweep in list(sweeps):
            members = next(sweep, None)
            if members is None:
                sweeps.remove(sweep)
                finals.append([(m.entry.name, m.status, m.step, m.message) for m in last[sweep]])
            else:
                last[sweep], turns = members, turns + 1
        if turns in (40, 90):  # one leaves, and comes back as another process
            sweeps[-1].close()
            sweeps[-1:] = [run_sweep(make_grid(grid), cache, tmp_path / "sweep", resume=True, at_once=3)]
    assert contents(tmp_path / "sweep") == alone[name]
    assert len(finals) == 2 and finals[0] == finals[1]


def test_the_share_of_a_process_counts_rates_that_are_tried() -> None:
    assert make_grid(HALVED).first_reading() == 4
    assert make_grid(TUNED).first_reading() == 2 * 2 + 2


def test_a_sweep_that_another_works_on_is_joined_or_refused(cache: ActivationCache, tmp_path: Path) -> None:
    first = run_sweep(make_grid(HALVED), cache, tmp_path / "sweep")
    next(first)
    with pytest.raises(UserError, match="continue it with resume"):
        next(run_sweep(make_grid(HALVED), cache, tmp_path / "sweep"))
    with pytest.raises(UserError, match="begun with another grid"):
        next(run_sweep(make_grid(TUNED), cache, tmp_path / "sweep", resume=True))
    second = run_sweep(make_grid(HALVED), cache, tmp_path / "sweep", resume=True)
    assert all(member.run is None for member in next(second))  # the first one has all of them
    first.close()
    while not any(member.run for member in next(second)):
        pass
    second.close()
    assert not (tmp_path / "sweep" / ".workers").exists()
    with pytest.raises(UserError, match="another patience"), Claims(tmp_path, 5).only("a"):
        Claims(tmp_path, 6).take("a")
    with pytest.raises(UserError, match="at_once=0 must be"):
        next(run_sweep(make_grid(HALVED), cache, tmp_path / "other", at_once=0))


HOLDER = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("claims", sys.argv[1])
claims = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claims)
touch = os.utime
os.utime = lambda path, times=None, **more: touch(path, (time.time() - 86_400,) * 2, **more)  # a clock a day behind
held = claims.Claims(claims.Path(sys.argv[2]), 3.0)
assert held.take("sae")
print("held", flush=True)
until = time.monotonic() + 90
while not (lost := held.lost()) and time.monotonic() < until:
    time.sleep(0.1)
print(*lost, flush=True)
"""


def test_a_halted_worker_is_relieved_and_learns_it_and_a_wrong_clock_does_not_matter(tmp_path: Path) -> None:
    file = ROOT / "saelab" / "sweep" / "claims.py"
    command = [sys.executable, "-c", HOLDER, str(file), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        mine = Claims(tmp_path, 3.0)
        began = time.monotonic()
        while time.monotonic() - began < 3.7:
            assert not mine.take("sae")
            time.sleep(0.1)
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        while not mine.take("sae"):
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        assert time.monotonic() - began > 1.5  # two heartbeats of the three seconds may have passed before the halt
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "sae\n"
        assert mine.lost() == set()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
    assert not mine.others()
    mine.leave()
    assert not (tmp_path / ".workers").exists()


KILLED = """
import sys, torch
torch.set_num_threads(1)
from saelab.data.cache import ActivationCache
from saelab.sweep import make_grid, run_sweep
grid = eval(sys.argv[3])
for number, _ in enumerate(run_sweep(make_grid(grid), ActivationCache(sys.argv[1]), sys.argv[2], at_once=2)):
    if number == 9:
        print("training", flush=True)
        sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_worker_is_relieved_at_once(
    cache: ActivationCache, alone: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WAIT", 0.01)
    command = [sys.executable, "-c", KILLED, str(cache.path), str(tmp_path / "sweep"), repr(HALVED)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "training\n"
    sweep = run_sweep(make_grid(HALVED), cache, tmp_path / "sweep", resume=True)
    while any(member.run for member in next(sweep)):
        pass  # until only those are left that the other process has
    process.kill()
    process.communicate()
    began = time.monotonic()
    members = list(sweep)[-1]
    assert time.monotonic() - began < Claims(tmp_path).patience / 2
    assert {member.status for member in members} == {"finished", "halted"}
    assert contents(tmp_path / "sweep") == alone["halved"]


TOML = '[train]\nepochs = 2\nbatch_size = 64\n[[grid]]\nvariant = ["topk", "abs_topk"]\nd_sae = 20\nk = [2, 3]\n'


@pytest.mark.slow
def test_the_command_with_two_workers(cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "grid.toml").write_text(TOML)
    args = ["sweep", str(cache.path), str(tmp_path / "grid.toml"), "--device", "cpu", "--out"]
    main([*args, str(tmp_path / "one"), "--json"])
    main([*args, str(tmp_path / "two"), "--workers", "2"])
    said = capsys.readouterr()
    assert "a worker ended" not in said.err
    left, right = (contents(tmp_path / name) for name in ("one", "two"))
    timed = {n for n in left if n.endswith(("evaluation.json", "report.html", "sweep.parquet", "summary.parquet"))}
    assert left.keys() == right.keys()
    assert {n: b for n, b in left.items() if n not in timed} == {n: b for n, b in right.items() if n not in timed}
    one, two = (load_results(tmp_path / name) for name in ("one", "two"))
    assert all(row["cpu_seconds"] > 0 for row in [*one, *two])
    assert [row | {"cpu_seconds": None} for row in one] == [row | {"cpu_seconds": None} for row in two]


def test_workers_that_cannot_be(cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "grid.toml").write_text(TOML)
    args = ["sweep", str(cache.path), str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out")]
    for more, said in (
        (["--workers", "0"], "workers=0 for device=auto"),
        (["--device", "cpu", "cuda:77"], "device 'cuda:77' is not available here"),
        (["--device", "cpu", "cpu", "--workers", "1"], "give at least one for each device"),
        (["--at-once", "0"], "at_once=0 must be at least 1"),
        (["--patience", "0"], "patience=0 must be positive"),
        (["--out", "s3://bucket/sweep"], "s3://bucket/sweep cannot be written by this command"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*args, *more])
        assert caught.value.code == 2 and said in capsys.readouterr().err.replace("\n", " ")
        assert not (tmp_path / "out").exists()
