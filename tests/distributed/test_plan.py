"""The arithmetic of `saelab plan`, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saelab.cli import main
from saelab.distributed.plan import Machine, layouts, plan, traffic_per_step


def test_traffic_by_hand() -> None:
    # 4 data ranks: a ring sends 2 * 3/4 of the gradient: W_enc and W_dec (2 * 10 * 8), b_enc (10), b_dec (8), 4 B each.
    assert traffic_per_step(16, 8, 10, 3, data_size=4)["gradients"] == 1.5 * 4 * 178
    # 2 dictionary ranks of 5 latents: 16 tokens x 3 candidates x 8 B; the reconstruction of 16 x 8 floats once over.
    split = traffic_per_step(16, 8, 10, 3, dict_size=2)
    assert split == {"gradients": 0, "candidates": 16 * 3 * 8, "reconstruction": 4 * 16 * 8, "bias": 4 * 8}
    assert not any(traffic_per_step(16, 8, 10, 3).values())


def test_a_million_latents_by_hand() -> None:
    machine = Machine(matmul_tflops=500, memory_tbs=2, fast_gbs=100, slow_gbs=10)
    eight = plan(8, 8, 131_072, 4096, 2**20, 64, machine)
    assert eight.memory_gb["weights, gradients, moments (fp32)"] == pytest.approx(16 * 2 * 2**17 * 4096 / 1e9, rel=1e-3)
    assert eight.seconds["encode"] == pytest.approx(2 * 131_072 * 4096 * 2**17 / 500e12)
    assert eight.seconds["reconstruction exchange"] == pytest.approx(2 * 7 / 8 * 4 * 131_072 * 4096 / 100e9, rel=1e-3)
    assert eight.bottleneck == "encode"
    wide = plan(64, 64, 131_072, 4096, 2**20, 64, machine)
    assert wide.seconds["candidate exchange"] == pytest.approx(63 * 131_072 * 64 * 8 / 10e9)


def test_layouts_that_fit_come_first_and_divide() -> None:
    found = layouts(8, 131_072, 4096, 2**20, 64, Machine())
    assert {(p.data_size, p.dict_size) for p in found} == {(8, 1), (4, 2), (2, 4), (1, 8)}
    assert found[0].total_memory_gb <= 80 < found[-1].total_memory_gb
    assert layouts(8, 4, 8, 3, 2, Machine()) == []


def test_the_command(capsys: pytest.CaptureFixture) -> None:
    main(["plan", "--json", "--gpus", "8", "64"])
    plans = json.loads(capsys.readouterr().out)
    assert [p["gpus"] for p in plans] == [8, 64] and plans[0]["bottleneck"] == "encode"
    main(["plan", "--d-sae", "16384", "--d-in", "768", "--gpus", "1"])
    assert "tokens per second" in capsys.readouterr().out
    for wrong in (["--gpus", "0"], ["--gpus"], ["--matmul-tflops", "0"], ["--slow-gbs", "-1"], ["--memory-tbs", "nan"]):
        with pytest.raises(SystemExit) as caught:
            main(["plan", *wrong])
        assert caught.value.code == 2


def test_the_table_of_the_how_to_is_what_plan_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "many-gpus.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    for gpus, layout, memory, sent, time, tokens, limit in rows[1:]:
        best = layouts(int(gpus), 131_072, 4096, 2**20, 64, Machine())[0]
        assert layout == f"{best.data_size} x {best.dict_size}"
        assert memory == f"{best.total_memory_gb:.1f} GB"
        assert sent == f"{sum(best.traffic_mb.values()):,.0f} MB"
        assert time == f"{1e3 * sum(best.seconds.values()):.0f} ms"
        assert tokens == f"{best.tokens_per_second:,.0f}"
        assert limit == best.bottleneck
    assert len(rows) == 4
