"""The learning-rate grid: its sample, a tiny run that is continued, and rules recovered from made-up results."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from saelab import ActivationCache
from saelab.bench.__main__ import benchmarks
from saelab.bench.learning_rate.__main__ import Bench, listed, main, name_of, search, train_once
from saelab.bench.learning_rate.design import KS, STEPS, TIERS, WEIGHTS, WIDTHS, Point, design, seconds
from saelab.bench.learning_rate.results import append, read
from saelab.bench.learning_rate.rules import Rule, costs, curves, default, fit, regret, report, tabulate
from saelab.errors import UserError
from saelab.training.rate import CONSTANT, POWERS, UNITS
from tests.planted import activations

CACHES = [("world", 128, False), ("model", 576, False)]
RESULTS = Path(__file__).parents[2] / "notebooks" / "results" / "learning-rate.jsonl"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    folder = tmp_path_factory.mktemp("caches") / "planted" / "tiny"
    return ActivationCache.from_tensors(folder, activations(1200, 8), held_out=0.2)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def test_a_prefix_of_the_sample_is_balanced_and_always_the_same() -> None:
    points = list(itertools.islice(design(CACHES, 0), 120))
    assert points == list(itertools.islice(design(CACHES, 0), 120))
    assert points != list(itertools.islice(design(CACHES, 1), 120))
    assert len({point.key for point in points}) == len(points)
    assert Counter(point.cache for point in points) == {"world": 60, "model": 60}
    counts, weight = Counter(point.variant for point in points), sum(WEIGHTS.values())
    assert all(abs(counts[name] - 120 * share / weight) <= 4 for name, share in WEIGHTS.items())
    assert all(WIDTHS[0] <= p.d_sae <= WIDTHS[1] and p.d_sae % 128 == 0 for p in points)
    assert all(STEPS[0] <= p.n_steps <= STEPS[1] and KS[0] <= p.k <= KS[1] for p in points)
    assert {p.batch_size for p in points} >= {512, 1024, 2048, 4096}
    widths = {name: d_in for name, d_in, _ in CACHES}
    times = [seconds(point, widths[point.cache]) for point in points]
    assert max(times) <= TIERS[-1] and min(times) < TIERS[0] < TIERS[2] < max(times)


def test_gradients_have_a_variant_of_their_own() -> None:
    points = list(itertools.islice(design([*CACHES, ("gradients", 64, True)], 0), 90))
    assert {p.variant for p in points if p.cache == "gradients"} == {"gradient_topk"}
    assert Counter(p.cache for p in points)["gradients"] == 10


def test_the_search_ends_with_both_neighbours_of_the_best() -> None:
    def loss(place: int) -> float:
        return math.inf if place > 4 else abs(place - 1) + 1.0

    assert dict(search(1e-3, {}, loss)) == {0: 2, 1: 1, 2: 2}
    assert min(dict(search(1.0, {}, loss))) == 0, "a rate at which training diverges is left downwards"
    assert list(search(1e-3, {0: 2.0, 1: 1.0}, loss)) == [(2, 2.0)]
    assert list(search(1e-3, {0: 2.0, 1: 1.0, 2: 2.0}, loss)) == []


def test_a_tiny_grid_is_continued_where_it_stopped(
    tmp_path: Path, cache: ActivationCache, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, out = tmp_path / "points.jsonl", tmp_path / "results.jsonl"
    points = [Point("planted/tiny", variant, 64, 16, 8, 2) for variant in ("topk", "jump_relu")]
    keys.write_text("".join(json.dumps(point.row()) + "\n" for point in points))
    command = ["--caches", str(cache.path), "--keys", str(keys), "--out", str(out)]
    main([*command, "--points", "1"])
    first = lines(out)
    assert len(first) >= 3 and {row["key"] for row in read(out)} == {points[0].key}
    assert all(0 < row["fvu"] == row["loss"] and row["l0"] == 2 and row["n_steps"] == 8 for row in read(out))
    main(command)
    both = lines(out)
    assert both[: len(first)] == first and {row["key"] for row in read(out)} == {point.key for point in points}
    penalty = [row for row in read(out) if row["variant"] == "jump_relu"]
    assert penalty and all(row["loss"] == row["fvu"] for row in penalty), "L0 is asked for, so FVU can be compared"
    assert set(curves(read(out))) == {point.key for point in points}
    main(command)
    assert lines(out) == both
    capsys.readouterr()
    out.write_bytes(b"\n".join(both[:-1]) + b"\n" + both[-1][:40])  # killed while writing the last line
    main(command)
    assert [drop(row) for row in read(out)] == [drop(json.loads(line)) for line in both]
    assert capsys.readouterr().out.count(" lr ") == 1


def drop(row: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if name not in ("seconds", "number")}


def test_the_power_of_two_of_the_activations_does_not_matter(tmp_path: Path, cache: ActivationCache) -> None:
    scaled = ActivationCache.from_tensors(tmp_path / "planted" / "big", 1024 * activations(1200, 8), held_out=0.2)
    bench = Bench({"small": cache, "big": scaled})
    for variant in ("topk", "jump_relu"):
        small, big = (train_once(Point(name, variant, 64, 16, 8, 2), 1e-2, bench) for name in bench.caches)
        assert small["loss"] == big["loss"] and small["l0"] == big["l0"]
    twice = Point("small", "jump_relu", 64, 16, 8, 2, scale=2.0)
    assert train_once(twice, 1e-2, bench)["loss"] != small["loss"], "its bandwidth is in units of the scaled data"


def synthetic(rule: Rule) -> Iterator[dict[str, object]]:
    """Results of 24 points whose best rates follow a rule; losses rise with the squared distance from it."""
    for point in itertools.islice(design(CACHES, 3), 24):
        best = rule(point.row())
        for place in range(-2, 3):
            lr = math.exp(best) * 2.0**place
            yield {**point.row(), "lr": lr, "loss": 0.3 * math.exp(0.4 * (math.log(lr) - best) ** 2)}


def test_a_planted_rule_is_recovered() -> None:
    planted = Rule(("n_steps", "d_sae"), math.log(3e-3), (-0.3, -0.5), {})
    points = list(curves(list(synthetic(planted))).values())
    assert len(points) == 24
    found = fit(points, planted.terms, offsets=False)
    assert found.exponents == pytest.approx(planted.exponents, abs=0.05)
    assert math.exp(found.constant) == pytest.approx(3e-3, rel=0.1)
    assert np.mean(costs(points, found)) < 0.002
    assert tabulate(points).mean(0).min() > 0.02, "one rate for all costs more"


def test_regret_is_read_between_the_measured_rates() -> None:
    x, y = np.log([1e-3, 2e-3, 4e-3]), np.log([0.4, 0.2, 0.3])
    assert regret(x, y, x) == pytest.approx([1.0, 0.0, 0.5])
    assert 0 <= regret(x, y, np.array(math.log(3e-3))) <= 0.5
    assert regret(x, y, np.array(math.log(5e-4))) == pytest.approx(3.0), "the line through the outermost two"


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "a"}', '{"key": "a", "cache": "b", "variant": "topk", "lr": 0}'])
def test_a_broken_line_is_refused_in_one_line(
    line: str, tmp_path: Path, cache: ActivationCache, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    row = {**Point("planted/tiny", "topk", 64, 16, 8, 2).row(), "lr": 1e-3, "loss": 0.5}
    append(out, row)
    out.write_text(out.read_text() + line + "\n" + json.dumps(row) + "\n")
    for options in (["--fit"], ["--caches", str(cache.path)]):
        with pytest.raises(UserError) as refused:
            main(["--out", str(out), *options])
        message = str(refused.value)
        assert "line 2 of" in message and "delete the line" in message and "\n" not in message


def test_wrong_input_is_refused_in_one_line(tmp_path: Path, cache: ActivationCache) -> None:
    out, keys = str(tmp_path / "results.jsonl"), tmp_path / "points.jsonl"
    with pytest.raises(UserError, match="name at least one activation cache"):
        main(["--out", out])
    keys.write_text(json.dumps(Point("other/cache", "topk", 64, 16, 8, 2).row()) + "\n")
    with pytest.raises(UserError, match="needs the cache other/cache"):
        main(["--out", out, "--caches", str(cache.path), "--keys", str(keys)])
    keys.write_text('{"variant": "topk"}\n')
    with pytest.raises(UserError, match="line 1 of"):
        list(listed(keys))


def test_the_committed_results_give_the_table_of_the_page() -> None:
    records = read(RESULTS)
    assert len({(row["key"], row["lr"]) for row in records}) == len(records), "a rate was measured twice"
    assert "/tmp" not in RESULTS.read_text() and "/home" not in RESULTS.read_text()
    page = (RESULTS.parents[2] / "docs" / "learning-rate.md").read_text()
    few = [row for row in records if row["cache"].startswith("planted")]
    real = [row for row in records if not row["cache"].startswith("planted")]
    formula = " ".join(f"({name} / {UNITS[name]:g})^{POWERS[name]:g}" for name in UNITS)
    assert f"lr = 4.6e-3 {formula}" in page and CONSTANT == 4.6e-3
    for group in (few, real):
        points = list(curves([row for row in group if row.get("scale", 1.0) == 1.0]).values())
        assert f"| {len(points)} |" in page
        assert f"{np.mean(costs(points, default)):.2%}".replace("%", " %") in page
    assert "planted world" in report(few)


def test_it_is_listed_and_names_caches_without_their_folders(tmp_path: Path) -> None:
    assert "best learning rate" in benchmarks()["saelab.bench.learning_rate"]
    assert name_of(tmp_path / "smollm2" / "blocks.9.hook_resid_post") == "smollm2/blocks.9"
