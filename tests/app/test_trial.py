"""The panel that tries a latent at three calibrated strengths, as any page may show it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from streamlit.testing.v1 import AppTest
from test_pages import ENTRY, launch

from saelab.features import FeatureIndex
from saelab.lm import load_model
from saelab.steering import Add, calibrate_each, generate_tokens
from saelab.steering.directions import random_direction
from saelab.steering.measure.effects import UnsteeredBaseline
from saelab.steering.neutral import NEUTRAL
from saelab.workspace import Workspace, steering


def script() -> None:
    import loaders
    from parts import trial

    from saelab.workspace import steering

    run = loaders.workspace().runs["sick"]
    source = loaders.opened(run)
    model = loaders.need_model(run, "The trial")
    trial.panel(run, source, model, steering.pick_latent(source, 3, 1), "here")


def test_pairs_with_a_dead_latent_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ENTRY.parent))
    from parts import tables

    matched = pd.DataFrame({"left": [0, 1, 2], "right": [5, 6, 7]})
    # The latent 1 fires with its negative pole alone; 2 never, and neither does 5 on the right.
    left = pd.DataFrame({"latent": [0, 0, 1, 1, 2, 2], "pole": [1, -1] * 3, "count": [3, 0, 0, 4, 0, 0]})
    right = pd.DataFrame({"latent": [5, 6, 7], "pole": [1, 1, 1], "count": [0, 2, 2]})
    assert [tables.silent_pairs(matched, known) for known in ((left, right), (left, None), (None, None))] == [2, 1, 0]


def test_models_of_one_name_promote_tokens_of_their_own(monkeypatch: pytest.MonkeyPatch, sick_folder: Path) -> None:
    monkeypatch.syspath_prepend(str(ENTRY.parent))
    import loaders

    first, second = (load_model(str(sick_folder / "model")) for _ in range(2))
    with torch.no_grad():
        second.unembed.weight.neg_()
    direction = torch.randn(first.cfg.d_model, generator=torch.Generator().manual_seed(0))
    raised = [loaders.promoted(model, direction, 5) for model in (first, second)]
    assert raised[0] != raised[1]
    assert raised[1] == loaders.promoted(first, -direction, 5)  # what the logit lens of the first suppresses


def test_three_strengths_stand_beside_the_control(monkeypatch: pytest.MonkeyPatch, sick_folder: Path) -> None:
    monkeypatch.syspath_prepend(str(ENTRY.parent))
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(sick_folder))
    monkeypatch.setenv("SAELAB_APP_MODEL", str(sick_folder / "model"))
    from parts import trial

    budgets = (0.001, 0.002, 0.004)  # the model is random: little moves it
    monkeypatch.setattr(trial, "BUDGETS", budgets)
    app = AppTest.from_function(script, default_timeout=60).run()
    app.text_input(key="trial_prompt").input("the river runs")
    app.number_input(key="trial_length").set_value(5)
    app.button(key="trial_generate_here").click().run()
    assert not app.exception and not app.error, (app.exception, app.error)
    *_, made_with, texts = app.session_state["trial_here"]
    assert made_with == "#3, “the river runs”, 5 tokens"
    assert [text.name for text in texts] == ["unsteered", *(f"KL {b:g}" for b in budgets), "random control"]
    assert not any(text.stopped for text in texts)
    model, source = load_model(str(sick_folder / "model")), Workspace.scan(sick_folder).run("sick")
    vector = steering.pick_latent(source, 3, 1).vector
    found = calibrate_each(model, vector, NEUTRAL, budgets)
    lengths = [one.strength for one in found]
    control = texts[-1].interventions[0].length
    assert [[add.length for add in text.interventions] for text in texts] == [[], *([s] for s in lengths), [control]]
    random = Add(random_direction(vector, 0), control)
    damage = UnsteeredBaseline(model, NEUTRAL).measure(random).mean_kl
    assert damage == pytest.approx(found[1].damage, rel=0.05), "the control does the damage of the middle strength"
    assert texts[-1].note.startswith(f"KL {damage:.3g} nats per token on neutral texts, where KL 0.002 has")
    adds = [[], *([Add(vector, s)] for s in lengths), [random]]
    ids = torch.tensor([[1, *model.tokenizer("the river runs", add_special_tokens=False)["input_ids"]]])
    assert [t.tokens for t in texts] == [generate_tokens(model, ids, None, a, max_new_tokens=5)[0] for a in adds]
    shown = " ".join(element.body for element in app.get("html"))
    for text in texts[1:]:
        assert f"KL {text.damage.kl:.2f} nats per token here, perplexity {text.damage.perplexity:.3g}" in shown
    app.run()
    assert shown.count("sl-strip") == 5 and app.session_state["trial_here"][-1] is texts


def test_numbers_of_a_signed_sae_are_of_latents_and_of_the_right_pole(
    monkeypatch: pytest.MonkeyPatch, sick_folder: Path
) -> None:
    app = launch(monkeypatch, sick_folder, model="none")
    app.selectbox(key="run").select("signed").run()
    assert not app.exception and not app.error, (app.exception, app.error)
    (chart,) = [item for item in app.get("plotly_chart") if "overview_density" in item.proto.id]
    counts = json.loads(chart.proto.spec)["data"][0]["customdata"]
    index = FeatureIndex(sick_folder / "signed")
    counted = np.frombuffer(base64.b64decode(counts["bdata"]), counts["dtype"]).sum()
    assert counted == index.d_sae, "a pole is no latent"

    monkeypatch.syspath_prepend(str(ENTRY.parent))
    from parts import latent as parts

    table = index.table().pivot(index="latent", columns="pole", values=["max", "q50"])
    number = int((table["max"][1] / table["max"][-1]).where(table["max"][-1] > 0).idxmax())
    weaker = parts.below(index, number)
    for pole in (1, -1):
        largest, median = (float(table[name][pole][number]) for name in ("max", "q50"))
        assert weaker(pole * largest) == pytest.approx(1.0, abs=0.02) and weaker(pole * median) < 0.9
    # On the other pole's scale the largest activation of the weaker one would be an ordinary one.
    assert weaker(float(table["max"][-1][number])) < 0.9
