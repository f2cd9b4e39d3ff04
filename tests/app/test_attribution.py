"""The Attribution page: a prediction explained, the text without its causes, and what goes to other pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest
from test_pages import launch

from saelab import viz
from saelab.layout import CONFIG
from saelab.viz.theme import DARK, LIGHT
from saelab.workspace.steering import Pick

PROMPT = "the river runs past"


def succeed(app: AppTest) -> AppTest:
    assert not app.exception and not app.error, (app.exception, app.error)
    return app


def explained(monkeypatch: pytest.MonkeyPatch, folder: Path, variant: str, **fields: Any) -> AppTest:
    app = launch(monkeypatch, folder, model=str(folder / "model"))
    app.selectbox(key="run").select(f"runs/{variant}")
    app.switch_page("views/attribution.py").run()
    app.text_area(key="attribution_prompt").input(PROMPT)
    for name, value in fields.items():
        app.text_input(key=f"attribution_{name}").input(value)
    return app.button(key="FormSubmitter:attribution_form-Explain").click().run()


@pytest.mark.parametrize("variant", ["abs_topk", "matching_pursuit", "batch_topk"])
def test_a_prediction_is_explained_and_changed(monkeypatch: pytest.MonkeyPatch, folder: Path, variant: str) -> None:
    app = succeed(explained(monkeypatch, folder, variant, target=" mill", against=" towns"))
    graph = app.session_state["attribution"].graph
    assert graph.target == "logit of ' mill' minus logit of ' towns'" and graph.latents
    drawn = {item.proto.id.rsplit("-", 1)[-1]: json.loads(item.proto.spec) for item in app.get("plotly_chart")}
    marks = [name for trace in drawn["attribution_figure"]["data"] for name in trace.get("customdata") or ()]
    assert set(marks) == {node.id for node in graph.nodes}
    legend = [trace for trace in drawn["attribution_figure"]["data"] if trace.get("showlegend") is not False]
    assert {trace["marker"]["color"] for trace in legend} <= {LIGHT.muted, DARK.muted}, "colours are signs"
    assert any("Orange raises the explained number, blue lowers it" in caption.value for caption in app.caption)
    assert "place" not in app.dataframe[0].value, "there is one"
    assert "<script" not in json.dumps(drawn["attribution_figure"]), "tokens and labels are text"
    assert list(app.dataframe[0].value["effect"]) == [node.effect for node in graph.latents]
    succeed(app.button(key="attribution_continue").click().run())
    said = [caption.value.replace("\\", "") for caption in app.caption]
    first = (graph.causes or graph.latents)[0]
    on = f"#{first.latent}{' −' if first.pole < 0 else ''} on ‘{graph.tokens[first.position]}’ ({first.position})"
    assert any(text.startswith("Chosen: ") and on in text and "on every token but the first" in text for text in said)
    shown = " ".join(element.proto.body for element in app.get("html"))
    found = graph.faithfulness
    assert found is not None and all(f"{x:+.2f}" in shown for x in (found.whole, found.kept, found.others, found.none))
    *_, texts = app.session_state["attribution_text"]
    assert set(texts) == {"as it is", "changed"} and texts["as it is"].tokens
    app.text_input(key="attribution_recipe").input("page test")
    succeed(app.button(key="FormSubmitter:attribution_save-Save").click().run())
    assert (folder / "recipes" / "page-test").is_dir()
    shutil.rmtree(folder / "recipes")


def test_latents_go_to_steering(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = succeed(explained(monkeypatch, folder, "abs_topk"))
    graph = app.session_state["attribution"].graph
    succeed(app.button(key="attribution_steer").click().run())
    picks: list[Pick] = app.session_state["steering_picks"]["runs/abs_topk"]
    assert {(p.latent, p.pole) for p in picks} == {(n.latent, n.pole) for n in graph.causes[:3] or graph.latents[:3]}
    assert {p.operation for p in picks} == {"ablate"}
    assert any(box.value == "ablate" for box in app.selectbox)


def test_a_text_says_which_change_it_is_of(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = succeed(explained(monkeypatch, folder, "abs_topk"))
    graph = app.session_state["attribution"].graph
    # One that was chosen on two tokens is changed once, as it is on every other token.
    named = (f"#{n.latent}{' −' if n.pole < 0 else ''}" for n in graph.causes[:3] or graph.latents[:3])
    chosen = ", ".join(dict.fromkeys(named))
    assert any(f"{graph.value:+.3f} above the mean of all logits" in item.value for item in app.markdown)
    succeed(app.button(key="attribution_continue").click().run())
    assert not app.warning
    succeed(app.selectbox(key="attribution_operation").select("scale").run())
    assert "The choice has changed" in app.warning[0].value
    said = [caption.value.replace("\\", "") for caption in app.caption]
    assert f"Changed: ablate {chosen} on every token but the first" in said
    app.text_input(key="attribution_recipe").input(" ")
    app.button(key="FormSubmitter:attribution_save-Save").click().run()
    assert not app.exception and "name of letters, digits or dashes" in app.error[0].value


def test_another_sae_asks_again_and_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = succeed(explained(monkeypatch, folder, "abs_topk"))
    app.selectbox(key="run").select("runs/topk")
    succeed(app.run())
    assert any("press Explain" in caption.value for caption in app.caption)
    wrong = explained(monkeypatch, folder, "topk", target=" mill", against=" mill")
    assert not wrong.exception and "same token" in wrong.error[0].value


def test_saes_at_other_places_stand_beside_it(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    for name in ("topk", "abs_topk"):
        shutil.copytree(folder / "runs" / name, root / "runs" / name)
    config = root / "runs" / "topk" / CONFIG
    content = json.loads(config.read_text())
    content["metadata"] |= {"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": "transformer.h.1"}
    config.write_text(json.dumps(content))
    app = launch(monkeypatch, root, model=str(folder / "model"))
    app.selectbox(key="run").select("runs/abs_topk")
    app.switch_page("views/attribution.py").run()
    app.text_area(key="attribution_prompt").input(PROMPT)
    app.multiselect(key="attribution_also").select("runs/topk")
    succeed(app.button(key="FormSubmitter:attribution_form-Explain").click().run())
    stamps, _, graph = app.session_state["attribution"]
    assert [*stamps] == ["runs/abs_topk", "runs/topk"] and [place.layer for place in graph.places] == [0, 1]
    assert any(edge.target in {n.id for n in graph.latents if n.layer == 1} for edge in graph.edges)
    place = {name: node for name in ("blocks.1.hook_resid_post",) for node in graph.latents if node.layer == 1}
    for name, node in place.items():
        assert viz.node_name(graph, node).endswith(f"({node.position})") and f" at {name} on" in viz.node_name(
            graph, node
        )
