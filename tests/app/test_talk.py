"""What the model says on the Steering page: the control's damage, changes that do nothing, and chats."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest
from test_pages import launch
from test_steering import RUN, strongest, succeed, variants, workplace  # noqa: F401

from saelab import viz
from saelab.features import FeatureIndex
from saelab.lm import load_model
from saelab.steering import encode_chat, measure_text
from saelab.steering.measure.passages import Passage
from saelab.steering.measure.silent import without_effect
from saelab.workspace import Workspace, steering


def generated(
    monkeypatch: pytest.MonkeyPatch, place: Path, model: Path, picks: list[str], **address: str | list[str]
) -> AppTest:
    """The page with these picks, after Generate."""
    app = launch(monkeypatch, place, model=str(model))
    settings: dict[str, Any] = {"run": RUN, "pick": picks, "steering_length": "5", "steering_factors": "×1", **address}
    for name, value in settings.items():
        app.query_params[name] = value
    succeed(app.switch_page("views/steering.py").run())
    return succeed(app.button(key="FormSubmitter:steering_form-Generate").click().run())


@pytest.mark.parametrize("where", ["all", "generated"])
@pytest.mark.parametrize("operation", ["add;0.3max", "project-out;", "clamp;0.5max"])
def test_the_random_control_does_the_damage_of_the_change(
    monkeypatch: pytest.MonkeyPatch,
    workplace: Path,  # noqa: F811
    folder: Path,
    operation: str,
    where: str,
) -> None:
    pick = f"{strongest(folder)};{operation};{where}"
    app = generated(monkeypatch, workplace, folder / "model", [pick], steering_prompt="the river runs past a mill")
    texts = {name: turns[-1][1] for name, turns in variants(app).items()}
    model = load_model(str(folder / "model"))
    ids = [1, *model.tokenizer("the river runs past a mill", add_special_tokens=False)["input_ids"]]
    damages = [
        measure_text(model, ids, texts["unsteered"].tokens, texts[name].interventions).kl
        for name in ("steered ×1", "random control")
    ]
    assert damages[1] == pytest.approx(damages[0], rel=0.05), damages
    said = f"KL {damages[1]:.3g} nats per token on the unsteered text, where the steering has {damages[0]:.3g}"
    assert texts["random control"].note.endswith(said)
    assert any(said in element.proto.body for element in app.get("html"))


def test_a_change_that_does_nothing_says_why(
    monkeypatch: pytest.MonkeyPatch,
    workplace: Path,  # noqa: F811
    folder: Path,
) -> None:
    model, source = load_model(str(folder / "model")), Workspace.scan(workplace).run(RUN)
    words = [1, *model.tokenizer("the river", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        written = [int(model(torch.tensor([words]), return_type="logits")[0, -1].argmax())]
    table = FeatureIndex(workplace / RUN).table()
    for latent in table.loc[table["count"] > 0, "latent"].astype(int):
        step = steering.intervention(steering.pick_latent(source, latent, 1).changed(operation="ablate"), source)
        if without_effect(model, [step], [Passage(words, written)]):
            break
    settings: dict[str, Any] = {"steering_prompt": "the river", "steering_length": "1"}
    app = generated(monkeypatch, workplace, folder / "model", [f"{latent};ablate;;all"], **settings)
    (line,) = [info.value for info in app.info if "changes nothing here" in info.value]
    row = FeatureIndex(workplace / RUN).latent(latent, 1)
    expected = f"ablate changes nothing here, because latent {latent} fires on no token that it acts on; in its index"
    assert viz.markdown(expected) in line and viz.markdown(f"{row['density']:.3%}") in line
    assert viz.markdown(row["top_tokens"][0].strip()) in line
    texts = {name: turns[-1][1] for name, turns in variants(app).items()}
    assert texts["steered ×1"].damage.kl == 0 and "the steering does no damage" in texts["random control"].note
    succeed(app.run())
    assert any("changes nothing here" in info.value for info in app.info), "it stays beside the texts"
    loud = generated(monkeypatch, workplace, folder / "model", [f"{latent};clamp;1max;all"], **settings)
    assert not any("changes nothing here" in info.value for info in loud.info)


def test_the_tokens_of_a_chat_are_shown_as_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
    workplace: Path,  # noqa: F811
    folder: Path,
) -> None:
    shutil.copytree(folder / "model", workplace / "model")
    model = load_model(str(workplace / "model"))
    model.tokenizer.chat_template = "{% for m in messages %} {{ m.content }}{{ eos_token }}{% endfor %} grey"
    model.tokenizer.save_pretrained(workplace / "model")
    asked = {"steering_kind": "chat", "steering_system": "old towns", "steering_prompt": "the river"}
    app = launch(monkeypatch, workplace, model=str(workplace / "model"))
    for name, value in {"run": RUN, "pick": f"{strongest(folder)};add;1raw;all", **asked}.items():
        app.query_params[name] = value
    succeed(app.switch_page("views/steering.py").run())
    messages = [{"role": "system", "content": "old towns"}, {"role": "user", "content": "the river"}]
    read = encode_chat(model.tokenizer, messages)
    assert read.text == " old towns<bos> the river<bos> grey"
    (box,) = [one for one in app.expander if one.label == f"What the model reads: {len(read.ids)} tokens"]
    (strip,) = [element.proto.body for element in box.get("html")]
    assert strip.count("sl-pos") == 4, "four words stand in messages"
    app.number_input(key="steering_length").set_value(2)
    succeed(app.button(key="FormSubmitter:steering_form-Generate").click().run())
    succeed(app.run())
    assert any(one.label == f"What the model reads: {len(read.ids)} tokens" for one in app.expander), "no turn more"


def test_a_model_without_a_template_says_so(
    monkeypatch: pytest.MonkeyPatch,
    workplace: Path,  # noqa: F811
    folder: Path,
) -> None:
    pick = [f"{strongest(folder)};add;1raw;all"]
    app = generated(monkeypatch, workplace, folder / "model", pick)
    assert any("has no chat template, so a prompt is a text" in caption.value for caption in app.caption)
    app = generated(monkeypatch, workplace, folder / "model", pick, steering_kind="chat")
    (said,) = [warning.value for warning in app.warning]
    assert said.startswith("This address asks for a chat. The tokenizer of this model has no chat template")
