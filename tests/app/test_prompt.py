"""The Prompt page on every variant, with a tiny model: what it says of a text and of one token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest
from test_pages import launch

from saelab.sae import VARIANTS

TEXT = "the river runs past the old mill"


def read(monkeypatch: pytest.MonkeyPatch, folder: Path, variant: str) -> AppTest:
    app = launch(monkeypatch, folder, model=str(folder / "model"))
    app.selectbox(key="run").select(f"runs/{variant}")
    app.switch_page("views/prompt.py").run()
    app.text_area(key="prompt_text").input(TEXT)
    app.toggle(key="prompt_gradients").set_value(True)
    return succeed(app.button(key="FormSubmitter:prompt_form-Read").click().run())


def succeed(app: AppTest) -> AppTest:
    assert not app.exception and not app.error, (app.exception, app.error)
    return app


def figures(app: AppTest) -> dict[str, Any]:
    return {item.proto.id.rsplit("-", 1)[-1]: json.loads(item.proto.spec) for item in app.get("plotly_chart")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_is_read_and_one_token_explained(monkeypatch: pytest.MonkeyPatch, folder: Path, variant: str) -> None:
    app = read(monkeypatch, folder, variant)
    _, reading = app.session_state["prompt_reading"]
    position = next(i for i in range(reading.first, reading.n) if reading.l0()[i])
    app.session_state["prompt_position"] = position
    succeed(app.run())
    drawn = figures(app)
    assert "prompt_effects" in drawn and "prompt_heatmap" in drawn
    assert ("prompt_pursuit" in drawn) == (variant == "matching_pursuit")
    assert ("prompt_contest" in drawn) == (variant != "matching_pursuit")
    active = {latent for latent, _ in reading.active(position)}
    assert set(app.dataframe[0].value["latent"]) == active
    if variant == "matching_pursuit":
        steps = app.slider(key="prompt_step")
        succeed(steps.set_value(steps.max).run())
        assert any(item.value.startswith(f"Step {int(steps.max)} takes") for item in app.markdown)
    else:
        contest = drawn["prompt_contest"]["data"][0]
        named = {int(text.split()[0].removeprefix("#")) for text in contest["customdata"]}
        assert named & active and named - active, "winners and losers"
        assert any("Filled bars won" in item.value for item in app.caption)


def test_another_sae_reads_the_same_text_at_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = read(monkeypatch, folder, "topk")
    app.selectbox(key="run").select("runs/abs_topk")
    succeed(app.run())
    name, reading = app.session_state["prompt_reading"]
    assert name == "runs/abs_topk" and "".join(reading.strings[reading.first :]).strip() == TEXT
    assert reading.grads is not None, "what was switched on stays on"
    # A visit elsewhere loses nothing.
    succeed(app.switch_page("views/features.py").run())
    succeed(app.switch_page("views/prompt.py").run())
    assert app.text_area(key="prompt_text").value == TEXT


def test_a_model_with_other_weights_than_the_sae_was_trained_on_is_not_used(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    import shutil

    from saelab.lm import load_hf_model
    from saelab.lm.record import ModelRecord

    for name, fingerprint in (("same", ""), ("other", "0123456789abcdef")):
        run = tmp_path / "runs" / name
        shutil.copytree(folder / "runs" / "topk", run)
        record = ModelRecord.of(load_hf_model(folder / "model", device="cpu")).to_json()
        content = json.loads((run / "cfg.json").read_text())
        content["metadata"]["language_model"] = {**record, "fingerprint": fingerprint or record["fingerprint"]}
        (run / "cfg.json").write_text(json.dumps(content))
    app = launch(monkeypatch, tmp_path, model=str(folder / "model"))
    for name in ("same", "other"):
        app.switch_page("views/prompt.py").run()
        app.selectbox(key="run").select(f"runs/{name}")
        app.run()
        app.text_area(key="prompt_text").input(TEXT)
        app = app.button(key="FormSubmitter:prompt_form-Read").click().run()
        assert not app.exception
        assert [("other weights" in error.value) for error in app.error] == ([True] if name == "other" else [])
