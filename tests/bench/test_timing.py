"""The clock of the benchmarks: turns, warm-up, medians and ratios."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from saelab.bench.__main__ import benchmarks
from saelab.bench.timing import Clock, Seconds, write_out


def test_turns_are_taken_and_the_first_does_not_count() -> None:
    clock, order = Clock(), []
    clock.rounds({name: (lambda name=name: order.append(name)) for name in "ab"}, rounds=3)
    assert order == list("ab") * 4
    assert {name: len(times) for name, times in clock.times.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_turn_by_turn() -> None:
    clock = Clock()
    for wall in (1.0, 10.0, 2.0):  # the machine was busy in the second turn
        clock.add("ours", Seconds(wall, 1.0))
        clock.add("theirs", Seconds(2 * wall, 4.0))
    assert clock.ratio("theirs", "ours") == (2.0, 4.0)
    assert clock.median("ours") == (2.0, 1.0)
    assert clock.total("theirs") == (26.0, 12.0)
    assert clock.total("nothing") == (0.0, 0.0)


def test_the_result_of_timed_work_comes_back_after_the_device_is_done() -> None:
    waited: list[int] = []
    clock = Clock(wait=lambda: waited.append(1))
    assert clock.time("work", lambda: len(waited)) == 1
    assert len(waited) == 2 and clock.times["work"][0].wall >= 0


def test_out_is_json(tmp_path: Path) -> None:
    write_out(None, {})
    write_out(tmp_path / "found.json", {"ratio": 0.5})
    assert json.loads((tmp_path / "found.json").read_text()) == {"ratio": 0.5}


@pytest.mark.parametrize("name", ["cache", "steering"])
def test_a_small_cache_is_read_in_every_way(name: str) -> None:
    if name == "cache":
        from saelab.bench.cache import Settings, compare

        found = compare(Settings(rows=3000, d_in=8, batch_size=256, rounds=2))
        assert set(found) == {"shuffled", "corpus order", "plain copy"} and all(min(v) > 0 for v in found.values())
    else:
        from saelab.bench.steering import Settings, measure
        from tests.steering.models import llama

        ids = Settings(layer=1, d_sae=64, k=4, tokens=2, rounds=1)
        import torch

        speeds = measure(llama(), torch.tensor([[1, 5, 6]]), ids, 32)
        assert speeds[0].ratio == 1 and len(speeds) == 5


def test_asked_and_measured_l0_stand_in_one_table(tmp_path: Path) -> None:
    from saelab.bench.l0 import Options, planted, results

    options = Options(variants=("gated",), l0=(4, 8), factors=(1,), d_sae=128, steps=12, batch_size=150)
    rows = list(results(options, planted(tmp_path / "cache", rows=2000)))
    assert [(row["variant"], row["asked"], row["steps"]) for row in rows] == [("gated", 4, 12), ("gated", 8, 12)]
    assert all(abs(row["off"]) < 0.3 and row["fvu"] > 0 and row["trained"] > 0 for row in rows)


def test_overlap_is_printed_for_each_k(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from saelab.bench.overlap import main

    small = ["--samples", "6000", "--features", "12", "--epochs", "3", "--places", "5", "7"]
    rows = main(["--k", "2", "4", *small, "--out", str(tmp_path / "rows.json")])
    assert [(row["k"], row["steps"]) for row in rows] == [(2, 33), (4, 33)]
    for row in rows:
        assert row["l0"] == pytest.approx(row["k"], rel=0.15) and 0 < row["c_dec"] < 1 and 0 < row["recovered"] <= 1
        assert row["projections"][5] > row["projections"][7]
    shown = capsys.readouterr().out
    assert "true L0 2.6" in shown and f"{rows[0]['c_dec']:.4g}" in shown
    assert json.loads((tmp_path / "rows.json").read_text())[1]["k"] == 4


def test_the_benchmarks_are_listed() -> None:
    found = benchmarks()
    assert {name.rpartition(".")[2] for name in found} >= {"cache", "harvest", "sweep", "evaluation", "kernels"}
    assert all(found.values()) and not any("timing" in name for name in found)


def test_a_small_feature_index_is_timed(tmp_path: Path) -> None:
    from saelab.bench.features import main

    sizes = {"latents": 64, "tokens": 2048, "width": 8, "k": 4, "rows": 64, "pages": 2}
    main([f"--{name}={value}" for name, value in sizes.items()] + ["--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["latents"], found["tokens"], found["table_latents"]) == (64, 2048, 64)
    assert 0 < found["share_by_cpu_time"] < 1
    assert found["page_seconds_worst"] >= found["page_seconds_median"] > 0


def test_other_packages_are_timed_without_saelab(tmp_path: Path) -> None:
    """By a script that another environment's Python runs: it takes the clock and nothing else."""
    from saelab.bench.kernels import peers

    check = "import sys, runpy; clock = runpy.run_path(sys.argv[1])['new_clock']()"
    check += "; clock.rounds({'a': int}, 2); print(len(clock.times['a']), 'saelab' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check, peers.__file__], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_the_step_of_a_transcoder_is_timed_beside_that_of_an_sae() -> None:
    from saelab.bench.transcoder import KINDS, Settings, measure

    found = measure("64x8x16x2", Settings(rounds=1))
    assert found.keys() == KINDS.keys() and found["SAE"][1] == 1 and all(time > 0 for time, _ in found.values())


def test_attribution_is_timed(tmp_path: Path) -> None:
    from saelab.bench.attribution import KINDS, Settings, measure
    from saelab.lm import load_model
    from tests.tiny_lm import save_llama

    model = load_model(str(save_llama(tmp_path / "llama")))
    found = measure(model, Settings(layers=(0, 1), d_sae=32, k=4, tokens=6, rounds=1))
    assert found.keys() == KINDS.keys() and all(min(times) > 0 for times in found.values())
