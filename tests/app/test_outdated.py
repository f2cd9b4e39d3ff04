"""What a session keeps of an SAE whose files have changed since is marked, and never mixed with what is new."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest
from test_attribution import explained, succeed
from test_steering import open_page, strongest

from saelab.sae.weights import load_metadata, load_sae, save
from saelab.workspace import Workspace
from saelab.workspace.picks import renewed
from saelab.workspace.steering import pick_latent, pick_vector

CHANGED = "files have changed since"


@pytest.fixture
def workplace(folder: Path, tmp_path: Path) -> Path:
    """A run that a test may train again, beside the shared model."""
    shutil.copytree(folder / "runs" / "topk", tmp_path / "runs" / "topk")
    return tmp_path


def train_again(run: Path) -> None:
    """Other weights in the same files."""
    sae = load_sae(run)
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.roll(1, dims=0))
    save(sae, run, load_metadata(run))
    st.cache_resource.clear()  # the scan is kept for some seconds


def warnings(app: AppTest) -> list[str]:
    return [warning.value for warning in app.warning]


def pale(app: AppTest) -> int:
    return sum('class="sl-outdated"' in element.proto.body for element in app.get("html"))


def test_talk_and_doses_of_a_retrained_sae(monkeypatch: pytest.MonkeyPatch, workplace: Path, folder: Path) -> None:
    latent = strongest(folder)
    app = open_page(monkeypatch, workplace, folder / "model", latent)
    app.text_area(key="steering_prompt").input("the river")
    app.number_input(key="steering_length").set_value(2)
    succeed(app.button(key="FormSubmitter:steering_form-Generate").click().run())
    app.text_input(key="dose_concept").input("river")
    app.text_area(key="dose_targets").input("the mill and the")
    app.text_area(key="dose_neutral").input("old bridges near grey towns")
    succeed(app.button(key="FormSubmitter:steering_dose-Measure").click().run())
    assert not warnings(app) and not pale(app)
    (before,) = app.session_state["steering_picks"]["runs/topk"]

    train_again(workplace / "runs" / "topk")
    succeed(app.run())
    said = warnings(app)
    assert len(said) == 2 and all(CHANGED in text for text in said) and pale(app)
    (after,) = app.session_state["steering_picks"]["runs/topk"]
    own = load_sae(workplace / "runs" / "topk").W_dec[latent].detach()
    assert torch.allclose(after.vector.direction, own / own.norm(), atol=1e-6), "the pick is a latent of the new files"
    assert (after.operation, after.amount, after.label) == (before.operation, before.amount, before.label)
    # Doses of the former direction are not those of a recipe of the new one.
    app.text_input(key="recipe_name").input("new")
    succeed(app.button(key="FormSubmitter:steering_save-Save").click().run())
    assert '"doses"' not in (workplace / "recipes" / "new" / "recipe.json").read_text()

    succeed(app.button(key="FormSubmitter:steering_form-Generate").click().run())
    succeed(app.run())
    assert len(warnings(app)) == 1 and not pale(app), "the text is new, the doses are not"


def test_a_latent_that_is_gone_is_said(folder: Path) -> None:
    source: Any = Workspace.scan(folder).run("runs/topk")
    pick = pick_latent(source, 3, 1)
    vector = pick_vector(pick.vector, "means")
    assert renewed(vector, source) is vector
    assert renewed(pick.changed(amount=2.0, unit="norm"), source).strength in ("2.0max", "2.0norm")
    with pytest.raises(Exception, match="latent 48 does not exist"):
        renewed(pick.changed(latent=48), source)


def test_a_graph_of_a_retrained_sae_or_of_other_settings(
    monkeypatch: pytest.MonkeyPatch, workplace: Path, folder: Path
) -> None:
    monkeypatch.setattr("test_attribution.launch", with_model(folder))
    app = succeed(explained(monkeypatch, workplace, "topk"))
    assert not warnings(app) and any(button.key == "attribution_steer" for button in app.button)
    app.session_state["attribution_steps"] = 2  # as a step back in the browser does
    succeed(app.run())
    assert ["settings have changed" in text for text in warnings(app)] == [True]
    succeed(app.button(key="FormSubmitter:attribution_form-Explain").click().run())
    assert not warnings(app)

    train_again(workplace / "runs" / "topk")
    succeed(app.run())
    assert [CHANGED in text for text in warnings(app)] == [True]
    assert not any(button.key == "attribution_steer" for button in app.button), "its numbers name other latents now"
    succeed(app.button(key="FormSubmitter:attribution_form-Explain").click().run())
    assert not warnings(app) and any(button.key == "attribution_steer" for button in app.button)


def with_model(folder: Path) -> Any:
    """``launch`` with the model of another folder."""
    from test_pages import launch

    return lambda monkeypatch, place, model: launch(monkeypatch, place, model=str(folder / "model"))


def test_a_trial_of_a_retrained_sae(monkeypatch: pytest.MonkeyPatch, workplace: Path, folder: Path) -> None:
    latent = strongest(folder)
    app = with_model(folder)(monkeypatch, workplace, None)
    app.session_state["latent"] = latent
    app.switch_page("views/latent.py").run()
    succeed(app.toggle(key="latent_trial").set_value(True).run())
    app.text_input(key="trial_prompt").input("the river")
    app.number_input(key="trial_length").set_value(2)
    succeed(app.button(key=f"trial_generate_latent_{latent}_1").click().run())
    succeed(app.run())
    assert not warnings(app) and not pale(app)
    train_again(workplace / "runs" / "topk")
    succeed(app.run())
    assert [CHANGED in text for text in warnings(app)] == [True] and pale(app)


def test_saes_are_matched_again_where_their_cache_came_later(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    for name in ("topk", "gated"):
        shutil.copytree(folder / "runs" / name, tmp_path / name)
    app = with_model(folder)(monkeypatch, tmp_path, None)
    app.switch_page("views/compare.py").run()
    succeed(app.button(key="compare_go").click().run())
    assert any("Similarity: decoder cosine;" in caption.value for caption in app.caption)
    shutil.copytree(folder / "cache", tmp_path / "cache")
    sys.modules["loaders"]._scan.clear()  # the scan is kept for some seconds; what was matched must stay
    succeed(app.run())
    assert any("when you press Compare" in caption.value for caption in app.caption)
    succeed(app.button(key="compare_go").click().run())
    assert any("activation correlation over the first" in caption.value for caption in app.caption)
