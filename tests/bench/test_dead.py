"""The comparison of the two forms of AuxK runs, on the cache of an earlier version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saelab.bench import dead

CACHE = Path(__file__).parents[1] / "data/v0.1.0/caches/post"


def test_both_forms_train_the_same_saes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dead.json"
    arguments = ["--variants", "topk", "--d-sae", "64", "--k", "2", "--seeds", "2", "--dead-after", "64", "--out", out]
    rows = dead.main([str(CACHE), "--batch-size", "32", "--epochs", "4", *map(str, arguments)])
    assert json.loads(out.read_text()) == rows and len(rows) == 4
    assert {(row["form"], row["seed"]) for row in rows} == {(form, seed) for form in dead.FORMS for seed in (0, 1)}
    old, new = ([row["fvu"] for row in rows if row["form"] == form] for form in dead.FORMS)
    assert old != new, "the form made no difference"
    assert "rectified, straight-through" in capsys.readouterr().out
