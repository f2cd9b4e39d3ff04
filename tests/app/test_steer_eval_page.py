"""The page that shows an evaluation of steering."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_pages import launch


def result(**changes: Any) -> dict[str, Any]:
    """As ``steer_eval.json`` holds it."""
    known = {"mean": 1.0, "low": 0.5, "high": 1.5}
    scores = dict.fromkeys(("concept", "instruction", "fluency", "overall", "surprise"), known)
    point = {"level": 0.0, "concept": 1.0, "instruction": 1.0, "fluency": 1.2, "overall": 1.1, "surprise": 0.4}
    text = {
        "concept_name": "<b>sea</b>",
        "method": "latent",
        "instruction_text": "Describe [a](b).",
        "text": "<script>",
    }
    return {
        "scored_by": "proxies",
        "complete": False,
        "answers": 5,
        "of": 9,
        "cannot_tell": {"concept": "the classifiers reach 0.5"},
        "calibration": {"sea / 0": {"latent": {"about": "latent 3", "levels": [{"reached": False}]}}},
        "means": [{"method": "latent", "concepts": 1} | scores],
        "curves": {"none": [point], "latent": [point, point | {"level": 1.0, "fluency": None}]},
        "differences": [
            {"method": "latent", "reference": "prompt", "score": "overall", "mean": -0.5, "low": None, "high": None,
             "verdict": "cannot tell"}
        ],
        "examples": [text | {"concept": 1.0, "instruction": 1.0, "fluency": 1.0, "overall": 1.0, "strength": 3.0}],
    } | changes  # fmt: skip


def test_an_evaluation_is_shown_with_what_must_be_known_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "steering").mkdir()
    path = tmp_path / "steering" / "steer_eval.json"
    path.write_text(json.dumps(result()))
    app = launch(monkeypatch, tmp_path, model="none")
    app.switch_page("views/steer_eval.py").run()
    assert not app.exception and not app.error
    captions = " ".join(caption.value for caption in app.caption)
    for part in ("5 of 9 answers", "offline proxies", "Cannot tell concept", "did not reach their budget"):
        assert part in captions
    tables = [frame.value for frame in app.dataframe]
    assert tables[0].iloc[0]["concept"] == "1.00 (0.50 to 1.50)" and tables[1].iloc[0]["difference"] == "-0.50"
    assert tables[2].iloc[0]["text"] == "<script>"  # in a table, which shows text as text
    app.selectbox(key="steer_eval_method").select("latent").run()
    assert not app.exception
    path.write_text("{}")
    app.run()
    assert "damaged" in app.error[0].value


def test_an_evaluation_without_any_answer_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {name: value for name, value in result().items() if name not in ("means", "curves", "differences")}
    (tmp_path / "steer_eval.json").write_text(json.dumps(known | {"examples": []}))
    app = launch(monkeypatch, tmp_path, model="none")
    app.switch_page("views/steer_eval.py").run()
    assert not app.exception and not app.error
