"""What stands in an address: what a reader set on a page, so that reloading, sharing and Back lose nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from streamlit.elements.lib import policies
from streamlit.testing.v1 import AppTest
from test_pages import ENTRY
from test_steer_eval_page import result

from saelab.errors import UserError
from saelab.layout import STEER_EVAL
from saelab.sae.weights import load_metadata, load_sae, save
from saelab.steering import LatentFires, Schedule
from saelab.workspace import Workspace, collections, steering
from saelab.workspace.picks import pick_text, read_picks

TEXT = "the river runs past the old mill"


def visit(monkeypatch: pytest.MonkeyPatch, folder: Path, view: str, **address: str | list[str]) -> AppTest:
    """A page as a link opens it, in a fresh session."""
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(folder))
    monkeypatch.setenv("SAELAB_APP_MODEL", str(folder / "model"))
    app = AppTest.from_file(ENTRY, default_timeout=60)
    for name, value in {"run": "runs/abs_topk", **address}.items():
        app.query_params[name] = value
    return good(app.switch_page(f"views/{view}.py").run())


def good(app: AppTest) -> AppTest:
    assert not app.exception and not app.error, (app.exception, app.error)
    return app


def link(app: AppTest, title: str) -> dict[str, list[str]]:
    """The address that the menu leads to."""
    (found,) = [item.proto for item in app.get("page_link") if item.proto.label == title]
    return parse_qs(found.query_string)


def test_filters_of_the_search(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: dict[str, Any] = {"density": ["3%", "100%"], "entropy": ["1", "3.5"], "sort": "strongest", "dense": "true"}
    app = visit(monkeypatch, folder, "features", q="river", **asked)
    assert app.select_slider(key="density").value == (0.03, 1.0) and app.slider(key="entropy").value == (1.0, 3.5)
    assert app.text_input(key="q").value == "river" and app.selectbox(key="sort").value == "max"
    found = app.dataframe[0].value
    assert len(found) and (found["density"] >= 0.03).all() and found["token_entropy"].between(1, 3.5).all()
    # On another page the menu leads back to all of it.
    app.slider(key="entropy").set_value((0.5, 3.0)).run()
    good(app.switch_page("views/help.py").run())
    back = link(app, "Features")
    assert back == {"run": ["runs/abs_topk"], "q": ["river"], **asked_again(asked), "entropy": ["0.5", "3"]}
    app.query_params["entropy"] = back["entropy"]  # as a browser that follows the link
    good(app.switch_page("views/features.py").run())
    assert app.slider(key="entropy").value == (0.5, 3.0) and app.text_input(key="q").value == "river"


def test_filters_hold_for_a_marked_text_too(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    marked = {"q": "[[the river runs past a mill]] and old bridges", "dense": "true"}
    app = visit(monkeypatch, folder, "features", **marked)
    every = app.dataframe[0].value
    assert {"+", "−"} == set(every["pole"])
    app = visit(monkeypatch, folder, "features", **marked, density=["3%", "50%"], sign="− pole", sort="most frequent")
    found = app.dataframe[0].value
    left = every[(every["pole"] == "−") & (every["density"] >= 0.03)]
    assert 0 < len(left) < len(every) and set(found["latent"]) == set(left["latent"])
    assert (found["density"].diff().dropna() <= 0).all(), "and the order is the one that was asked for"
    assert any(caption.value == f"{len(left):,} of {len(every):,}" for caption in app.caption)
    app = visit(monkeypatch, folder, "features", **marked, where="label", similar="true")
    assert any("Not applied to a text: “in: label” and “similar meaning”" in caption.value for caption in app.caption)
    # Dense latents are hidden as in any search, until they are asked for.
    app = visit(monkeypatch, folder, "features", run="runs/topk", q=marked["q"])
    few = app.dataframe[0].value
    good(app.button(key="show_dense").click().run())
    every = app.dataframe[0].value
    assert (few["density"] <= 0.1).all() and len(few) == (every["density"] <= 0.1).sum() < len(every)


def asked_again(asked: dict[str, Any]) -> dict[str, list[str]]:
    return {name: value if isinstance(value, list) else [value] for name, value in asked.items()}


def test_a_text_is_read_as_the_link_says(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shown = {"prompt_text": TEXT, "prompt_rank": "activation", "token": "4", "prompt_hide_dense": "false"}
    app = visit(monkeypatch, folder, "prompt", **shown)
    assert any(heading.value.startswith("Token 4") for heading in app.subheader)
    assert app.selectbox(key="prompt_rank").value == "activation"
    (run, _, text, _), _ = app.session_state["prompt_reading"]
    assert (run, text) == ("runs/abs_topk", TEXT) and not any("too long" in caption.value for caption in app.caption)
    # A longer one has no room in an address; it is kept, and the page says that a link leaves it out.
    app.text_area(key="prompt_text").input("mill " * 320 + "river")
    good(app.button(key="FormSubmitter:prompt_form-Read").click().run())
    good(app.run())
    assert any("too long for an address" in caption.value for caption in app.caption)
    assert "prompt_text" not in app.query_params
    good(app.switch_page("views/help.py").run())
    assert "prompt_text" not in link(app, "Prompt") and len(str(link(app, "Prompt"))) < 2000
    good(app.switch_page("views/prompt.py").run())
    assert app.text_area(key="prompt_text").value.endswith("river")


def test_what_is_compared_and_drawn(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = visit(monkeypatch, folder, "compare")
    other = next(name for name in app.selectbox(key="compare_right").options if name.startswith("runs/gated"))
    app = visit(monkeypatch, folder, "compare", compare_right=other)
    assert app.selectbox(key="compare_right").value == "runs/gated"
    # The SAE was trained again since, with another seed.
    app = visit(monkeypatch, folder, "compare", compare_right="runs/gated (seed 7)")
    assert app.selectbox(key="compare_right").value == "runs/gated" and not left_out(app)
    app = visit(monkeypatch, folder, "training", training_runs=["runs/gated", "runs/topk"], training_axis="step")
    assert app.multiselect(key="training_runs").value == ["runs/gated", "runs/topk"]
    assert sorted(metric.label for metric in app.metric) == ["runs/gated", "runs/topk"]
    app = visit(monkeypatch, folder, "training", training_runs=["runs/nonexist"])
    assert app.multiselect(key="training_runs").value == ["runs/abs_topk"]
    assert left_out(app) == [f"This address also names **runs/nonexist**: not below {folder.name}."]


def left_out(app: AppTest) -> list[str]:
    """What a page says of the SAEs that its address names and it does not show."""
    return [warning.value for warning in app.warning if "also names" in warning.value]


@pytest.fixture
def other_places(folder: Path, tmp_path: Path) -> Path:
    """The workspace with SAEs that read another place, have no index, and are of another model."""
    for name in ("model", "runs/abs_topk", "runs/topk"):
        shutil.copytree(folder / name, tmp_path / name)
    changes: dict[str, dict[str, Any]] = {
        "runs/later": {"hook_name": "blocks.1.hook_resid_post"},
        "runs/topk 2": {"model_name": "some/other-model"},
        "runs/plain": {},
        "runs/twin_later": {"hook_name": "blocks.1.hook_resid_post", "model_name": "some/other-model"},
    }
    for name, changed in changes.items():
        save(load_sae(folder / "runs/topk"), tmp_path / name, {**load_metadata(folder / "runs/topk"), **changed})
    return tmp_path


PLACE = "blocks.0.hook_resid_post"


@pytest.mark.parametrize(
    ("view", "key", "text", "why"),
    [
        (
            "compare",
            "compare_right",
            "runs/later",
            f"it reads blocks.1.hook_resid_post, and runs/abs_topk reads {PLACE}",
        ),
        ("compare", "compare_right", "runs/abs_topk (seed 0)", "it is the SAE that is open"),
        (
            "prompt",
            "prompt_beside",
            "runs/later",
            f"it reads blocks.1.hook_resid_post, and runs/abs_topk reads {PLACE}",
        ),
        ("attribution", "attribution_also", "runs/topk", f"it reads {PLACE}, as runs/abs_topk does, and one SAE"),
        ("attribution", "attribution_also", f"runs/topk 2 · {PLACE}", f"it reads {PLACE}, as runs/abs_topk does"),
        ("attribution", "attribution_also", "runs/twin_later", "it is of another model, some/other-model"),
        ("health", "health_beside", "runs/plain", "it has no feature index"),
        ("training", "training_runs", "runs/plain", "it has no log"),
    ],
)
def test_a_further_sae_that_does_not_fit_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, other_places: Path, view: str, key: str, text: str, why: str
) -> None:
    app = visit(monkeypatch, other_places, view, **{key: text})
    (said,) = left_out(app)
    plain = said.replace("\\", "")
    named = "runs/topk 2" if text.startswith("runs/topk 2") else text.split(" ")[0]
    assert plain.startswith(f"This address also names **{named}**: left out, because {why}"), plain


def test_saes_of_two_models_are_said_to_be(monkeypatch: pytest.MonkeyPatch, other_places: Path) -> None:
    app = visit(monkeypatch, other_places, "compare", compare_right="runs/topk 2 (seed 0, same start)")
    assert app.selectbox(key="compare_right").value == "runs/topk 2" and not left_out(app)
    assert any("SAEs of two models" in warning.value for warning in app.warning)
    app = visit(monkeypatch, other_places, "prompt", prompt_beside="runs/topk 2")
    assert any(caption.value == "Trained on another model, some/other\\-model." for caption in app.caption)
    app = visit(monkeypatch, other_places, "prompt", prompt_beside="runs/topk")
    assert not any("another model" in caption.value for caption in app.caption)


@pytest.mark.parametrize(("view", "key"), [("collections", "collection"), ("steer_eval", "steer_eval")])
def test_what_else_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, other_places: Path, view: str, key: str) -> None:
    collections.add(other_places, "mine", [collections.Member("runs/topk", 1)])
    (other_places / "mine").mkdir()
    config = {"methods": ["none", "latent"], "budget": 0.5, "levels": [0.5, 1.0, 2.0], "batch": 48}
    made = result(sae="runs/topk", config=config, classifiers={"the sea": {}, "war": {}})
    (other_places / "mine" / STEER_EVAL).write_text(json.dumps(made))
    app = visit(monkeypatch, other_places, view, **{key: "yours"})
    assert left_out(app) == [f"This address also names **yours**: not below {other_places.name}."]
    assert not left_out(visit(monkeypatch, other_places, view, **{key: "mine"}))


@pytest.mark.parametrize(
    ("view", "key"), [("compare", "compare_right"), ("prompt", "prompt_beside"), ("attribution", "attribution_also")]
)
def test_a_further_sae_that_is_gone_is_named(
    monkeypatch: pytest.MonkeyPatch, folder: Path, view: str, key: str
) -> None:
    reading = {"prompt_text": TEXT} if view == "prompt" else {}
    app = visit(monkeypatch, folder, view, **{key: "runs/none"}, **reading)
    assert [warning.value for warning in app.warning if "runs/none" in warning.value] == [
        f"This address also names **runs/none**: not below {folder.name}."
    ]
    there = {"compare_right": "runs/topk (seed 0, same start)", "prompt_beside": "runs/topk"}.get(key)
    if there:
        app = visit(monkeypatch, folder, view, **{key: there}, **reading)
        assert not any("also names" in warning.value for warning in app.warning)


def test_interventions_are_part_of_the_address(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    words = ["3;add;0.5max;generated;when=5>0.25;schedule=0:1,20:0;layers=0-1", "-7;ablate;;all"]
    app = visit(monkeypatch, folder, "steering", pick=words, steering_prompt="the mill", steering_length="3")
    first, second = app.session_state["steering_picks"]["runs/abs_topk"]
    assert [pick_text(first), pick_text(second)] == words and app.text_area(key="steering_prompt").value == "the mill"
    assert app.text_input(key="limit_when_#3").value == "5>0.25" and app.slider(key="steering_add_#3").value == 0.5
    app.text_input(key="limit_layers_#3").input("1")
    app.slider(key="steering_add_#3").set_value(0.75)
    good(app.button(key="FormSubmitter:steering_form-Generate").click().run())
    assert app.query_params["pick"] == ["3;add;0.75max;generated;when=5>0.25;schedule=0:1,20:0;layers=1", words[1]]
    steps = app.session_state["steering_talk"]["variants"]["steered ×1"][-1][1].interventions
    assert [step.hook_name for step in steps] == ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"]
    # A step back: what the address says is shown, whatever the widgets had.
    app.query_params["pick"] = words[:1]
    good(app.run())
    (pick,) = app.session_state["steering_picks"]["runs/abs_topk"]
    assert pick_text(pick) == words[0] and app.slider(key="steering_add_#3").value == 0.5
    # A limit that means nothing is said, and the page goes on.
    app.text_input(key="limit_schedule_#3").input("soon").run()
    assert not app.exception and "TOKEN" in app.error[0].value


def test_a_link_to_interventions_prints_no_trace(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policies, "_shown_default_value_warning", False)  # it is shown once in a process
    monkeypatch.setattr("streamlit.runtime.exists", lambda: True)
    words = "3;scale;2.5;generated;when=5>0.25;schedule=0:1,20:0"
    app = visit(monkeypatch, folder, "steering", pick=[words, "4;add;0.75raw;prompt;layers=0-1"])
    assert app.slider(key="steering_scale_#3").value == 2.5 and app.slider(key="steering_add_#4").value == 0.75
    assert (
        app.selectbox(key="steering_unit_#4").value == "raw"
        and app.selectbox(key="steering_where_#4").value == "prompt"
    )
    assert "default value" not in caplog.text and not policies._shown_default_value_warning


def test_a_calibrated_strength_is_that_of_the_limited_change(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = visit(monkeypatch, folder, "steering", pick="3;add;0.5max;all;layers=0-1")
    good(app.button(key="limit_calibrate_#3").click().run())
    (both,) = app.session_state["steering_picks"]["runs/abs_topk"]
    assert "found by calibration" in both.note and app.slider(key="steering_add_#3").value == both.amount
    app.text_input(key="limit_layers_#3").input("").run()
    good(app.button(key="limit_calibrate_#3").click().run())
    (alone,) = app.session_state["steering_picks"]["runs/abs_topk"]
    # The random model withstands the largest strength that is tried: the damage tells what was measured.
    damage = [float(re.search(r"KL ([\d.]+) nats", pick.note)[1]) for pick in (alone, both)]  # pyright: ignore
    assert damage[0] < damage[1], "two layers do more damage"


def test_picks_as_words(folder: Path) -> None:
    source = Workspace.scan(folder).run("runs/abs_topk")
    pick = steering.pick_latent(source, 4, -1).changed(
        where="prompt", when=LatentFires(source, 2, 1.5, -1), schedule=Schedule([(-1, 0), (0, 1)])
    )
    for one in (pick, pick.changed(operation="clamp", amount=0.25), pick.changed(operation="project-out", amount=1.0)):
        (again,) = read_picks([str(pick_text(one))], source)
        assert steering.intervention(again, source).settings() == steering.intervention(one, source).settings()
    assert pick_text(steering.pick_vector(pick.vector, "means")) is None
    for text, said in {
        "": "does not begin with a latent",
        "<b>": "does not begin with a latent",
        "48": "48",
        "9" * 40: "9",
        "3;drop": "there are ablate, add",
        "3;add;1lots": "1lots",
        "3;ablate;;everywhere": "there are all",
        "3;add;1max;all;when=rain": "is no condition",
        "3;add;1max;all;layers=x": "layers",
        "3;add;1max;all;sudo=1": "known are when",
    }.items():
        with pytest.raises(UserError, match=said):
            read_picks([text], source)
