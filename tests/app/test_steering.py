"""The Steering page: measuring, saving and loading recipes, on a tiny model."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest
from test_pages import launch

from saelab import viz
from saelab.errors import UserError
from saelab.features import FeatureIndex
from saelab.lm import load_model
from saelab.lm.tokens import written_text
from saelab.steering import (
    Add,
    Chat,
    LatentFires,
    ProjectOut,
    Recipe,
    Schedule,
    SteeringVector,
    calibrate,
    generate_tokens,
    measure_text,
)
from saelab.steering.measure.control import random_controls
from saelab.steering.neutral import NEUTRAL
from saelab.workspace import Workspace, recipes, steering

RUN = "runs/topk"


@pytest.fixture
def workplace(folder: Path, tmp_path: Path) -> Path:
    """The shared workspace's TopK run and model in a folder that may be written to."""
    shutil.copytree(folder / RUN, tmp_path / RUN)
    return tmp_path


def open_page(monkeypatch: pytest.MonkeyPatch, workplace: Path, model: Path, latent: int) -> AppTest:
    app = launch(monkeypatch, workplace, model=str(model))
    app.session_state["steer_pick"] = (RUN, latent, 1)
    return succeed(app.switch_page("views/steering.py").run())


def succeed(app: AppTest) -> AppTest:
    assert not app.exception and not app.error, (app.exception, app.error)
    return app


def strongest(folder: Path) -> int:
    table = FeatureIndex(folder / RUN).table()
    return int(table.loc[table["max"].idxmax(), "latent"])


def figures(app: AppTest) -> dict[str, Any]:
    return {item.proto.id.rsplit("-", 1)[-1]: json.loads(item.proto.spec) for item in app.get("plotly_chart")}


def check_charts(effect: Any, damage: Any, measured: Any, length: float) -> None:
    """Eight random directions are drawn as an interval, and the strength on the page is marked."""
    # The vector, the difference of means, the mean of the random directions and their interval.
    assert len(effect["data"]) == len(damage["data"]) == 4
    drawn = {trace["name"]: trace for trace in damage["data"]}
    assert all(len(trace["y"]) == 4 and min(trace["y"]) >= 0 for trace in drawn.values() if "fill" not in trace)
    controls = [dose for dose in measured.doses if dose.direction.startswith("random")]
    assert len({dose.direction for dose in controls}) == 8
    (band,) = [trace for trace in effect["data"] if "fill" in trace]
    assert band["name"] == "95 % of random directions (8 drawn)"
    first = [d.logit_shift for d in controls if d.strength == measured.doses[0].strength]
    # Student's t with seven degrees of freedom, from a table.
    half = 2.3646 * statistics.stdev(first) * (1 + 1 / 8) ** 0.5
    assert band["y"][0] == pytest.approx(statistics.mean(first) + half, rel=1e-3)
    assert band["y"][-1] == pytest.approx(statistics.mean(first) - half, rel=1e-3)
    (mark,) = effect["layout"]["shapes"]
    assert mark["x0"] == pytest.approx(length), "the strength on the page is marked"
    assert sorted({d.strength for d in measured.doses}) == pytest.approx([length * f for f in (0.25, 0.5, 1, 2)])


def measure(app: AppTest, concept: str, targets: str) -> None:
    """Fill in the form of dose and response, and press its button."""
    app.text_input(key="dose_concept").input(concept)
    app.text_area(key="dose_targets").input(targets)
    app.text_area(key="dose_neutral").input("old bridges near grey towns\ngreen hills past the river")
    app.text_area(key="dose_positive").input("the river runs")
    app.text_area(key="dose_negative").input("grey towns near")
    succeed(app.button(key="FormSubmitter:steering_dose-Measure").click().run())


def test_one_prompt_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, workplace: Path, folder: Path) -> None:
    app = open_page(monkeypatch, workplace, folder / "model", strongest(folder))
    measure(app, "river", "the mill and the")
    assert any("Measured on one prompt" in caption.value for caption in app.caption)
    said = " ".join(element.proto.body for element in app.get("html"))
    assert "in logit shift; one prompt gives no interval, at equal damage" in said and "nan" not in said
    assert any("averaged over all tokens of the prompts" in caption.value for caption in app.caption)


def test_measure_save_and_find_it_again(monkeypatch: pytest.MonkeyPatch, workplace: Path, folder: Path) -> None:
    latent = strongest(folder)
    app = open_page(monkeypatch, workplace, folder / "model", latent)
    app.slider(key=f"steering_add_#{latent}").set_value(0.5).run()

    measure(app, "river, mill", "the mill and the\nrain falls on a")
    *_, pick, measured = app.session_state["steering_doses"]
    assert pick.label == f"#{latent}" and len({dose.direction for dose in measured.doses}) >= 3
    assert any(", measured on ‘river’, ‘mill’: at an" in item.value for item in app.markdown)
    effect, damage = list(figures(app).values())
    length = SteeringVector.from_latent(Workspace.scan(folder).run(RUN), latent).length("0.5max")
    check_charts(effect, damage, measured, length)
    said = " ".join(element.proto.body for element in app.get("html"))
    for one in measured.contrasts:
        assert f"{one.difference:+.2f} ({one.low:+.2f} to {one.high:+.2f})" in said

    app.text_input(key="recipe_name").input("More of it")
    succeed(app.button(key="FormSubmitter:steering_save-Save").click().run())
    assert app.dataframe[0].value["name"].tolist() == ["More of it"], "the table shows it at once"
    recipe = Recipe.load(workplace / "recipes" / "More-of-it")
    text = (workplace / "recipes" / "More-of-it" / "recipe.json").read_text()
    assert '"run": "topk"' in text and str(workplace) not in text, "a recipe is made to be shared"
    assert recipe.settings()[0]["strength"] == "0.5max"
    saved = recipe.provenance
    assert saved["verdict"] == measured.verdict and len(saved["doses"]) == len(measured.doses)
    assert len(saved["promotes"]) == 5 and saved["measured"] == f"#{latent}" and saved["words"] == ["river", "mill"]

    # Doses are of the vector that was measured: a recipe of another one does not get them.
    app.number_input(key="steering_latent_number").set_value(other := (latent + 1) % 48)
    app.button(key="FormSubmitter:steering_latent-Add").click().run()
    succeed(app.button(key=f"steering_remove_#{latent}").click().run())
    assert any("no longer among the interventions" in item.value for item in app.markdown)
    app.text_input(key="recipe_name").input("Other")
    succeed(app.button(key="FormSubmitter:steering_save-Save").click().run())
    saved = Recipe.load(workplace / "recipes" / "Other").provenance
    assert saved["picks"][0]["label"] == f"#{other}" and "doses" not in saved and "verdict" not in saved
    shutil.rmtree(workplace / "recipes" / "Other")

    # A new session without a model still shows the recipes.
    app = launch(monkeypatch, workplace, model="none")
    app = succeed(app.switch_page("views/steering.py").run())
    (row,) = app.dataframe[0].value.to_dict("records")
    assert row["name"] == "More of it" and row["strength"] == "0.5max" and f"latent {latent}" in row["origin"]
    assert row["norm"] > 0 and row["promotes"] and row["verdict"] == f"#{latent} on ‘river’, ‘mill’: {measured.verdict}"


def test_texts_are_shown_with_the_settings_that_made_them(
    monkeypatch: pytest.MonkeyPatch, workplace: Path, folder: Path
) -> None:
    latent = strongest(folder)
    app = open_page(monkeypatch, workplace, folder / "model", latent)
    app.number_input(key="steering_length").set_value(3)
    succeed(app.button(key="FormSubmitter:steering_form-Generate").click().run())
    (pick,) = app.session_state["steering_picks"][RUN]
    made = viz.markdown(f"add #{latent} {pick.strength}")
    assert any(made in item.value for item in app.caption), [c.value for c in app.caption]
    assert not app.warning and not pale(app)
    app.slider(key=f"steering_add_#{latent}").set_value(0.5).run()
    assert len(app.warning) == 1 and "changed since" in app.warning[0].value and pale(app) == 5
    assert any(made in item.value for item in app.caption), "what made them does not change"
    app.slider(key=f"steering_add_#{latent}").set_value(pick.amount).run()
    assert not app.warning and not pale(app)


def variants(app: AppTest) -> dict[str, list[Any]]:
    return app.session_state["steering_talk"]["variants"]


def test_a_latent_begins_calibrated_and_several_strengths_are_written_at_once(
    monkeypatch: pytest.MonkeyPatch, workplace: Path, folder: Path
) -> None:
    latent = strongest(folder)
    app = open_page(monkeypatch, workplace, folder / "model", latent)
    model, source = load_model(str(folder / "model")), Workspace.scan(workplace).run(RUN)
    vector = SteeringVector.from_latent(source, latent)
    found = calibrate(model, vector, NEUTRAL, budget_kl=0.3, tolerance=0.05)
    (pick,) = app.session_state["steering_picks"][RUN]
    assert vector.length(pick.strength) == pytest.approx(found.strength, rel=5e-3)  # three digits
    label = FeatureIndex(workplace / RUN).latent(latent, 1)["label"]
    assert label and any(viz.markdown(label[:60]) in item.value for item in app.markdown), "a number says nothing"
    app.text_area(key="steering_prompt").input("the river runs")
    app.number_input(key="steering_length").set_value(4)
    app.button_group(key="steering_factors").set_value([2.0, 1.0])
    succeed(app.button(key="FormSubmitter:steering_form-Generate").click().run())
    texts = {name: turns[-1][1] for name, turns in variants(app).items()}
    assert list(texts) == ["unsteered", "steered ×1", "steered ×2", "random control"]
    ids = torch.tensor([[1, *model.tokenizer("the river runs", add_special_tokens=False)["input_ids"]]])
    for name, factor in (("unsteered", 0.0), ("steered ×1", 1.0), ("steered ×2", 2.0)):
        steer = Add(vector, factor * vector.length(pick.strength))
        assert texts[name].tokens == generate_tokens(model, ids, None, steer, max_new_tokens=4)[0]
        damage = measure_text(model, ids[0].tolist(), texts[name].tokens, steer)
        assert texts[name].damage.kl == pytest.approx(damage.kl, rel=1e-4, abs=1e-9)
    said = " ".join(element.proto.body for element in app.get("html"))
    for name, text in texts.items():
        assert f"perplexity {text.damage.perplexity:.3g} under the unsteered model" in said
        assert name == "unsteered" or f"KL {text.damage.kl:.2f} nats per token here" in said


def test_a_chat_goes_on_under_every_variant(monkeypatch: pytest.MonkeyPatch, workplace: Path, folder: Path) -> None:
    shutil.copytree(folder / "model", workplace / "model")
    model = load_model(str(workplace / "model"))
    template = "{% for m in messages %} {{ m.content }}{{ eos_token }}{% endfor %}"
    model.tokenizer.chat_template = template
    model.tokenizer.save_pretrained(workplace / "model")
    latent = strongest(folder)
    app = open_page(monkeypatch, workplace, workplace / "model", latent)
    succeed(app.button_group(key="steering_kind").set_value("chat").run())
    app.text_input(key="steering_system").input("grey towns")
    app.selectbox(key=f"steering_where_#{latent}").select("answer")
    app.number_input(key="steering_length").set_value(4)
    app.button_group(key="steering_factors").set_value([1.0])
    for message in ("the river", "a mill"):
        app.text_area(key="steering_prompt").input(message)
        succeed(app.button(key="FormSubmitter:steering_form-Generate").click().run())
    (pick,) = app.session_state["steering_picks"][RUN]
    source = Workspace.scan(workplace).run(RUN)
    for name, steps in (("unsteered", []), ("steered ×1", [steering.intervention(pick, source)])):
        chat = Chat(model, steps, system="grey towns", max_new_tokens=4)
        answers = [chat.say("the river"), chat.say("a mill")]
        found = [written_text(model.tokenizer, text.tokens) for _, text in variants(app)[name]]
        assert found == answers, name
    assert pick.where == "answer"
    app.text_area(key="steering_prompt").input("old bridges")
    app.button(key="steering_new_chat").click().run()
    assert "steering_talk" not in app.session_state
    # A text is no chat: that is said, and nothing is lost.
    app.button_group(key="steering_kind").set_value("text").run()
    app.button(key="FormSubmitter:steering_form-Generate").click().run()
    assert not app.exception and "messages of a chat" in app.error[0].value


def test_conditions_and_schedules_of_a_recipe_are_kept(workplace: Path, folder: Path) -> None:
    source, model = Workspace.scan(workplace).run(RUN), load_model(str(folder / "model"))
    limited = Add(
        SteeringVector.from_latent(source, 3),
        2.0,
        when=LatentFires(source, 5, 0.5),
        schedule=Schedule([(0, 1), (9, 0)]),
    )
    Recipe.of(model, limited).save(recipes.recipe_folder(workplace, "limited"))
    (pick,) = recipes.reopen(workplace, "limited", source)
    again = steering.intervention(pick, source).settings()
    assert (again["when"], again["schedule"]) == (limited.settings()["when"], limited.settings()["schedule"])
    assert steering.limits(pick) == [
        f"only where latent 5 is above 0.5 at {source.hook_name}",
        "weight of generated tokens: 1 at 0, 0 at 9",
    ]
    (random,) = random_controls([steering.intervention(pick, source)])
    assert random.schedule == limited.schedule and random.when is pick.when
    # A text made under other limits is another one, and the page says so by this line.
    assert "add #3 " in (said := steering.described([pick], "w", {})) and "where 5>0.5 schedule 0:1,9:0" in said
    other = pick.changed(when=LatentFires(source, 5, 0.25, -1))
    assert "where -5>0.25 schedule" in steering.described([other], "w", {})
    # What leaves the first token alone has a control that does.
    clamped = steering.pick_latent(source, 3, 1).changed(operation="clamp")
    others = (clamped, clamped.changed(skip_first=False), clamped.changed(operation="add"))
    steps = [steering.intervention(each, source) for each in others]
    for made in (steps, random_controls(steps)):
        assert [step.skip_first for step in made] == [True, False, False]
    # A change at several layers is one intervention of the page.
    wide = pick.changed(layers="0-1", label="wide")
    steps = [*steering.interventions(wide, source, model), steering.intervention(pick, source)]
    Recipe.of(model, steps).save(recipes.recipe_folder(workplace, "wide"))
    both, alone = recipes.reopen(workplace, "wide", source)
    assert (both.layers, alone.layers) == ("0,1", "")
    again = [step.settings() for step in steering.interventions(both, source, model)]
    assert [{**s, "length": pytest.approx(s["length"])} for s in again] == [s.settings() for s in steps[:2]]


def pale(app: AppTest) -> int:
    return sum('class="sl-outdated"' in element.proto.body for element in app.get("html"))


def test_a_recipe_comes_back_to_the_page_as_it_was(workplace: Path, folder: Path) -> None:
    run = Workspace.scan(workplace).run(RUN)
    model = load_model(str(folder / "model"))
    source = run
    latent = strongest(folder)
    direction = SteeringVector.from_tensor(torch.arange(1.0, 33.0), source.hook_name)
    plain = steering.pick_latent(source, latent, 1)
    picks = [
        plain.changed(amount=0.75),
        plain.changed(operation="clamp", amount=1.5),
        plain.changed(operation="min-clamp", amount=0.5),
        plain.changed(operation="scale", amount=3.0),
        plain.changed(operation="ablate"),
        plain.changed(operation="clamp", amount=0.5, where="generated"),
        plain.changed(operation="clamp", amount=0.25, skip_first=False, keep_error=False),
        steering.pick_vector(direction, "means").changed(amount=-2.0),
        steering.pick_vector(direction, "means").changed(amount=1.0, skip_first=True),
        steering.pick_vector(direction, "means").changed(operation="project-out"),
    ]
    about = recipes.provenance(picks, "prompt", [])
    recipe = Recipe.of(model, [steering.intervention(pick, source) for pick in picks], provenance=about)
    recipe.save(recipes.recipe_folder(workplace, "all"))
    back = recipes.reopen(workplace, "all", source)
    again = [steering.intervention(pick, source).settings() for pick in back]
    for key in ("op", "where", "skip_first", "keep_error"):
        assert [step.get(key) for step in again] == [step.get(key) for step in recipe.settings()], key
    for before, after in zip(picks, back, strict=True):
        assert (after.label, after.operation, after.latent) == (before.label, before.operation, before.latent)
        assert after.where == before.where
        if before.operation not in {"ablate", "project-out"}:
            assert after.amount == pytest.approx(before.amount, rel=1e-3) and after.unit == before.unit
    other = Workspace.scan(folder).run("runs/abs_topk")
    with pytest.raises(UserError, match="another SAE"):
        recipes.reopen(workplace, "all", other)


def test_a_step_along_several_vectors_is_refused_not_shown_in_part(workplace: Path, folder: Path) -> None:
    source = Workspace.scan(workplace).run(RUN)
    vectors = [SteeringVector.from_latent(source, latent) for latent in (0, 1)]
    recipe = Recipe.of(load_model(str(folder / "model")), ProjectOut(vectors))
    recipe.save(recipes.recipe_folder(workplace, "span"))
    with pytest.raises(UserError, match="span acts along 2 vectors in one step, which this page cannot show"):
        recipes.reopen(workplace, "span", source)


def test_an_added_length_is_told_in_raw_units_and_beside_the_norm(folder: Path) -> None:
    run = Workspace.scan(folder).run(RUN)
    source = run
    direction = SteeringVector.from_tensor(torch.tensor([3.0, 4.0] + 30 * [0.0]), source.hook_name)
    pick = steering.pick_vector(direction, "means").changed(amount=-2.0)
    assert steering.size(pick) == "adds a vector of length 10 in raw units"
    known = pick.changed(vector=direction.with_units(rms_norm=40.0))
    assert steering.size(known).endswith("10 in raw units, 25% of the activations' root mean square norm")
    assert steering.size(known.changed(operation="project-out")) == ""


def test_a_damaged_recipe_is_one_row(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    (workplace / "recipes" / "torn").mkdir(parents=True)
    (workplace / "recipes" / "torn" / "recipe.json").write_text('{"interventions": 3}')
    app = launch(monkeypatch, workplace, model="none")
    app = succeed(app.switch_page("views/steering.py").run())
    assert "damaged" in app.dataframe[0].value["does"][0]


def test_latents_are_found_by_example_against_a_contrast(
    monkeypatch: pytest.MonkeyPatch, workplace: Path, folder: Path
) -> None:
    app = launch(monkeypatch, workplace, model=str(folder / "model"))
    app.switch_page("views/features.py").run()
    succeed(app.text_input(key="q").input("the [[river]] runs past").run())
    succeed(app.toggle(key="dense").set_value(True).run())
    alone = app.dataframe[0].value.set_index("latent")
    succeed(app.text_input(key="contrast").input("a river and a river").run())
    against = app.dataframe[0].value.set_index("latent")
    assert (alone["on_span"] == 1).all() and len(against)
    both = against.index.intersection(alone.index)
    # What also fires on the contrast's "river" loses specificity, and nothing gains by it.
    assert (against.loc[both, "off_span"] >= 0).all()
    fires = against.loc[both, "off_span"] > alone.loc[both, "off_span"]
    assert fires.any()
    lost = against.loc[both, "specificity"] < alone.loc[both, "specificity"]
    assert lost[fires].mean() > 0.5
    assert (against["specificity"].diff().dropna() <= 0).all(), "ranked by specificity"
    app.text_input(key="q").input("[[ ]]").run()
    assert not app.exception and "empty" in app.error[0].value
