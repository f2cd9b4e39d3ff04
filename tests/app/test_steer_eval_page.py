"""The page that shows an evaluation of steering."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest
from test_pages import launch

from saelab.errors import UserError
from saelab.workspace.jobs import Job, Jobs, Stopped


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
    config = {"methods": ["none", "latent"], "budget": 0.5, "levels": [0.5, 1.0, 2.0], "batch": 48}
    made = {"sae": "runs/an SAE", "config": config, "classifiers": {"the sea": {}, "war": {}}}
    path.write_text(json.dumps(result(**made)))
    app = launch(monkeypatch, tmp_path, model="none")
    app.switch_page("views/steer_eval.py").run()
    assert not app.exception and not app.error
    captions = " ".join(caption.value for caption in app.caption)
    for part in ("5 of 9 answers", "offline proxies", "Cannot tell concept", "did not reach their budget"):
        assert part in captions
    tables = [frame.value for frame in app.dataframe]
    assert tables[0].iloc[0]["concept"] == "1.00 (0.50 to 1.50)" and tables[1].iloc[0]["difference"] == "-0.50"
    assert tables[2].iloc[0]["text"] == "<script>"  # in a table, which shows text as text
    # The command is that of what is shown, whatever SAE the other pages are about.
    assert app.code[-1].value == (
        "saelab steer-eval 'runs/an SAE' --out steering --methods none latent --budget 0.5 --concept 'the sea' "
        "--concept war"
    )
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


def finished(app: AppTest, seconds: float = 120.0) -> AppTest:
    """The page once the evaluation has ended."""
    for _ in range(int(seconds / 0.2)):
        app.run()
        if not [button for button in app.button if button.key == "eval_stop"]:
            break
        time.sleep(0.2)
    assert not app.exception, app.exception
    return app


def test_an_evaluation_is_started_stopped_and_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "runs" / "topk", tmp_path / "run")
    app = launch(monkeypatch, tmp_path, model=str(folder / "model"))
    app.switch_page("views/steer_eval.py").run()
    assert not app.exception and not app.error and "saelab steer-eval run" in app.info[0].value
    app.multiselect(key="eval_methods").set_value(["latent", "random"])
    app.number_input(key="eval_instructions").set_value(8)
    app.number_input(key="eval_tokens").set_value(3)
    app.button_group(key="eval_levels").set_value([1.0, 2.0]).run()
    # Eight unsteered answers, and those of two methods at two strengths for two concepts.
    assert any("72 answers, 216 tokens at most" in caption.value for caption in app.caption)
    app.button(key="eval_estimate").click().run()
    assert not app.exception and any("minute" in caption.value for caption in app.caption)
    stopped = False

    def stop_early(self: Job, stage: str, done: int, total: int) -> None:
        nonlocal stopped
        self.stage, self.done, self.total = stage, done, total
        if not stopped and stage == "answers" and done:
            stopped = True
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Job, "tell", stop_early)
        app.button(key="eval_start").click().run()
        app = finished(app)
    assert any("was stopped" in info.value for info in app.info), [info.value for info in app.info]
    assert not app.error
    path = tmp_path / "evaluations" / "steering" / "steer_eval.json"
    partly = json.loads(path.read_text())
    assert not partly["complete"] and 0 < partly["answers"] < 72 and partly["of"] == 72
    sys.modules["loaders"]._scan.clear()  # a scan is kept for a few seconds
    app.run()
    assert app.selectbox(key="steer_eval").value == "evaluations/steering"
    app.button(key="eval_go_on").click().run()
    app = finished(app)
    assert not app.error and any("is complete" in item.value for item in app.success)
    whole = json.loads(path.read_text())
    assert whole["complete"] and whole["answers"] == 72 and {row["method"] for row in whole["means"]} >= {"latent"}
    # The same name with other settings is refused, and nothing is lost.
    app.number_input(key="eval_instructions").set_value(4).run()
    app.button(key="eval_start").click().run()
    app = finished(app)
    assert "other settings" in app.error[0].value and json.loads(path.read_text()) == whole


def test_one_job_runs_at_a_time_and_says_how_it_ended() -> None:
    jobs = Jobs()

    def endless(job: Job) -> None:
        for i in range(10_000):
            job.tell("counting", i, 10_000)
            time.sleep(0.01)

    def broken(job: Job) -> None:
        raise ValueError("a fault\nof many lines")

    first = jobs.start("first", endless)
    with pytest.raises(UserError, match="first is being computed"):
        jobs.start("second", endless)
    assert jobs.running() is first
    first.stop()
    for _ in range(500):
        if first.finished:
            break
        time.sleep(0.01)
    assert first.stopped and not first.error and jobs.running() is None and "counting" in first.text()
    second = jobs.start("second", broken)
    for _ in range(500):
        if second.finished:
            break
        time.sleep(0.01)
    assert second.error == "ValueError: a fault" and jobs.get("second") is second


def test_nothing_is_started_where_nothing_may_be_written(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("saelab.files._protected", set())
    monkeypatch.setenv("SAELAB_APP_READ_ONLY", "1")
    app = launch(monkeypatch, folder, model=str(folder / "model"))
    app.switch_page("views/steer_eval.py").run()
    assert not app.exception and not [button for button in app.button if button.key == "eval_start"]
    assert any("--read-only" in caption.value for caption in app.caption)
