"""Means over seeds and paired differences: against a brute-force bootstrap, and where nothing can be said."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.data.synthetic import Planted
from saelab.metrics import shared_fraction
from saelab.metrics.intervals import two_way
from saelab.sae.weights import load_sae
from saelab.sweep import load_results, load_summary, measure, save_results, summarise
from saelab.sweep.grid import make_grid
from saelab.sweep.guidance import points_of
from saelab.sweep.summary import groups
from saelab.sweep.widths import hedging_of_widths

GRID = """
[train]
epochs = 2
batch_size = 200
[[grid]]
variant = ["topk", "batch_topk"]
d_sae = 32
k = 3
seed = {seeds}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    x, _ = Planted(12, 24, l0=3, seed=1).sample(6000, seed=2)
    documents = torch.arange(6000) // 100
    ActivationCache.from_tensors(folder / "cache", x, documents=documents, context_length=10, held_out=0.3)
    for name, seeds in (("three", "[0, 1, 2]"), ("one", "0")):
        (folder / f"{name}.toml").write_text(GRID.format(seeds=seeds))
        main(["sweep", str(folder / "cache"), str(folder / f"{name}.toml"), "--out", str(folder / name)])
    return folder


def test_the_interval_covers_seeds_and_documents() -> None:
    rng, covered = np.random.default_rng(0), 0
    for trial in range(300):
        truth, deviations = 0.3, rng.uniform(0.5, 1.5, 40)
        seeds, documents = rng.normal(0, 0.05, (5, 1)), rng.normal(0, 0.2, (1, 40))
        errors = (truth + seeds + documents) * deviations
        mean, low, high = two_way(errors, deviations, seed=trial)
        assert low is not None and high is not None and low < mean < high
        covered += low <= truth <= high
        by_seed = errors.sum(1) / deviations.sum()
        assert high - low > 2 * stats.t.ppf(0.975, 4) * stats.sem(by_seed)
    assert stats.binomtest(covered, 300, 0.95).pvalue > 1e-3  # neither much too narrow nor much too wide


def test_one_seed_or_one_document_has_no_interval() -> None:
    assert two_way(np.ones((1, 5)), np.ones(5)) == (1.0, None, None)
    assert two_way(np.ones((5, 1)), np.ones(1)) == (1.0, None, None)


def test_tables_of_three_seeds(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, (summaries, differences) = load_results(place / "three"), load_summary(place / "three")
    assert [row["name"] for row in summaries] == ["topk", "batch_topk"]
    for row in summaries:
        own = [r for r in rows if r["variant"] == row["variant"]]
        assert row["seeds"] == 3 and row["documents"] == len(
            ActivationCache(place / "cache").documents("held_out").unique()
        )
        for name in ("fvu", "l0", "dead_fraction", "cpu_seconds", "parameters"):
            assert row[name] == pytest.approx(np.mean([r[name] for r in own]), rel=1e-9)
        assert row["fvu_low"] < row["fvu"] < row["fvu_high"]
        saes = [load_sae(place / "three" / r["folder"]) for r in own]
        pairs = [shared_fraction(a.W_dec, b.W_dec) for a, b in itertools.combinations(saes, 2)]
        assert len(pairs) == 3 and row["shared_latents"] == pytest.approx(np.mean([share for share, _ in pairs]))
        assert 0.2 < row["shared_latents"] <= 1 and row["shared_by_chance"] < 0.4  # few dimensions: some by chance
    (difference,) = differences
    fvu = {(row["variant"], row["seed"]): row["fvu"] for row in rows}
    by_hand = [fvu["topk", seed] - fvu["batch_topk", seed] for seed in range(3)]
    assert difference["difference"] == pytest.approx(np.mean(by_hand), rel=1e-6)
    assert difference["low"] < difference["difference"] < difference["high"]
    assert difference["verdict"] in ("a is better", "b is better", "inconclusive")
    report = (place / "three" / "report.html").read_text()
    assert "95 % intervals over seeds and held-out documents" in report and difference["verdict"] in report


def test_one_seed_says_that_nothing_can_be_said(place: Path) -> None:
    summaries, (difference,) = load_summary(place / "one")
    assert all(row["seeds"] == 1 and row["fvu_low"] is None and row["shared_latents"] is None for row in summaries)
    assert difference["verdict"] == "cannot say: one seed"


def test_saes_of_other_l0_are_not_ranked(place: Path) -> None:
    rows = load_results(place / "three")
    for row in rows:
        row["l0"] *= 1.2 if row["variant"] == "topk" else 1
    (difference,) = summarise(rows, place / "three")[1]
    assert difference["verdict"].startswith("cannot say: L0 differs by")


def test_groups_leave_out_what_did_not_finish() -> None:
    row: dict[str, Any] = {"name": "a_seed-0", "seed": 0, "variant": "topk", "k": 2, "asked_l0": 2, "d_sae": 8}
    row |= {"options": "{}", "lr": 1e-3, "status": "finished", "fvu": 0.5}
    rows = [
        row,
        row | {"name": "a_seed-1", "seed": 1, "status": "diverged", "fvu": None},
        row | {"lr": 2e-3, "name": "b"},
    ]
    assert {name: len(members) for name, members in groups(rows).items()} == {"a": 1, "b": 1}


def test_seeds_of_another_training_are_another_group(tmp_path: Path) -> None:
    keys = {"variant": "topk", "d_sae": 16, "k": [2, 3, 4], "seed": [0, 1], "aux_weight": [0.0, 0.5], "lr": 1e-3}
    entries = make_grid({"train": {"batch_size": 200}, "grid": [keys]}).entries
    rows: list[dict[str, Any]] = [
        {"name": e.name, "seed": e.train.seed, "variant": "topk", "k": e.l0, "asked_l0": e.l0, "d_sae": 16, "lr": 1e-3}
        | {"options": json.dumps(e.options), "training": json.dumps(e.training), "status": "finished", "fvu": 0.5}
        | {"l0": float(e.l0 or 0), "mean_cosine": e.train.aux_weight}
        for e in entries
    ]
    assert [json.loads(row["training"])["aux_weight"] for row in rows[:2]] == [0.0, 0.5]
    found = groups(rows)
    assert len(found) == 6 and {len(members) for members in found.values()} == {2}
    assert {point.group: point.overlap for point in points_of(rows)} == {
        "topk 16 aux_weight=0.0": 0.0,
        "topk 16 aux_weight=0.5": 0.5,
    }
    alone = [row for row in rows if row["mean_cosine"]]
    assert {point.group for point in points_of(alone)} == {"topk 16"}


def test_a_listed_rate_makes_groups_and_a_computed_one_does_not() -> None:
    keys = {"variant": "topk", "d_sae": [16, 32], "k": [2, 4, 8]}
    listed = make_grid({"train": {}, "grid": [keys | {"lr": [1e-3, 2e-3]}]}).entries
    computed = make_grid({"train": {}, "grid": [keys]}).entries
    tuned = make_grid({"train": {}, "grid": [keys | {"lr": "tune"}]}).entries
    tuned = [replace(e, train=replace(e.train, lr=1e-3 * i)) for i, e in enumerate(tuned, 1)]  # as they are trained
    for entries, kinds in ((listed, [" lr=0.001", " lr=0.002"]), (computed, [""]), (tuned, [""])):
        rows = [
            {
                "name": e.name,
                "variant": "topk",
                "d_sae": e.d_sae,
                "seed": 0,
                "l0": e.l0,
                "asked_l0": e.l0,
                "lr": 1e-3 * i,
            }
            | {
                "options": json.dumps(e.options),
                "training": json.dumps(e.training),
                "mean_cosine": 0.1,
                "folder": e.name,
            }
            | {"status": "finished"}
            for i, e in enumerate(entries, 1)
        ]
        found = Counter(point.group for point in points_of(rows))
        assert found == {f"topk {width}{kind}": 3 for width in (16, 32) for kind in kinds}
        assert len(hedging_of_widths(rows, "nowhere")) == 3 * len(kinds)


def test_shared_latents_are_counted_one_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 64, generator=generator)
    b = torch.cat([a[:10] + 0.05 * torch.randn(10, 64, generator=generator), torch.randn(30, 64, generator=generator)])
    assert shared_fraction(a, b) == (0.25, 0.0)
    assert shared_fraction(a, -b) == (0.0, 0.0) and shared_fraction(a, -b, signed=True) == (0.25, 0.0)
    copies = a[:1].expand(40, -1)  # one direction of b cannot be the partner of all of them
    assert shared_fraction(copies, b)[0] == 1 / 40


def test_tables_of_0_1_0_open(place: Path, tmp_path: Path) -> None:
    assert load_summary(tmp_path) == ([], [])
    assert measure and save_results
