"""The Prompt page on every variant, with a tiny model: what it says of a text and of one token."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest
from test_pages import launch

from saelab.errors import UserError
from saelab.features import FeatureIndex
from saelab.prompt.ranking import RANKINGS, Known, rank
from saelab.prompt.reading import Reading
from saelab.sae import VARIANTS
from saelab.sae.weights import load_metadata, load_sae, save
from saelab.workspace import Workspace

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


def test_a_run_that_changed_is_read_again_and_a_missing_index_is_said(
    monkeypatch: pytest.MonkeyPatch, sick_folder: Path, tmp_path: Path
) -> None:
    for name in ("sick", "signed"):
        shutil.copytree(sick_folder / name, tmp_path / name)
    shutil.rmtree(tmp_path / "signed" / "features")
    app = launch(monkeypatch, tmp_path, model=str(sick_folder / "model"))
    app.selectbox(key="run").select("sick")
    app.switch_page("views/prompt.py").run()
    app.text_area(key="prompt_text").input(TEXT)
    succeed(app.button(key="FormSubmitter:prompt_form-Read").click().run())
    succeed(app.multiselect(key="prompt_beside").set_value(["signed"]).run())
    said = [caption.value for caption in app.caption if "active latents." in caption.value]
    assert ["Ranked by activation" in text for text in said] == [False, True]
    _, before = app.session_state["prompt_reading"]
    assert app.run().session_state["prompt_reading"][1] is before
    sae = load_sae(tmp_path / "sick")
    with torch.no_grad():
        sae.b_enc += 1.0
    save(sae, tmp_path / "sick", load_metadata(tmp_path / "sick"))
    st.cache_resource.clear()  # the scan is kept for some seconds
    _, after = succeed(app.run()).session_state["prompt_reading"]
    assert after is not before and after.active(3) != before.active(3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_is_read_and_one_token_explained(monkeypatch: pytest.MonkeyPatch, folder: Path, variant: str) -> None:
    app = read(monkeypatch, folder, variant)
    _, reading = app.session_state["prompt_reading"]
    position = next(i for i in range(reading.first, reading.n) if reading.l0()[i])
    app.session_state["token"] = position
    succeed(app.run())
    succeed(app.toggle(key="prompt_hide_dense").set_value(False).run())
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


def test_the_last_token_has_no_effects(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing follows it in the text: its gradient is zero, and a chart of zeros would pass for a finding."""
    app = read(monkeypatch, folder, "topk")
    _, reading = app.session_state["prompt_reading"]
    assert not reading.grads[-1].any() and "prompt_effects" in figures(app)
    app.session_state["token"] = reading.n - 1
    succeed(app.run())
    assert "prompt_effects" not in figures(app)
    assert any("This is the last token" in caption.value for caption in app.caption)


def test_colours_are_scaled_to_tokens_that_were_trained_on(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """An attention sink in front is many times as strong as anything behind it."""
    app = read(monkeypatch, folder, "topk")
    asked, reading = app.session_state["prompt_reading"]
    acts = reading.acts.clone()
    acts[0] *= 1000
    sink = dataclasses.replace(reading, acts=acts, first=1).through(Workspace.scan(folder).run("runs/topk").sae)
    app.session_state["prompt_reading"] = asked, sink
    (cells,) = figures(succeed(app.run()))["prompt_heatmap"]["data"]
    ranked = [int(row[0].partition("<br>")[0].split()[0].removeprefix("#")) for row in cells["customdata"]]
    counted = [abs(value) for latent in ranked for value in sink.trace(latent)[1:]]
    assert cells["zmax"] == pytest.approx(max(counted)) and max(map(abs, sink.trace(ranked[0]))) >= max(counted)


def test_a_link_to_the_example_reads_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The text is left out of the address, because it is the default; the token is there."""
    app = launch(monkeypatch, folder, model=str(folder / "model"))
    app.query_params["token"] = "3"
    succeed(app.switch_page("views/prompt.py").run())
    (text, _), reading = app.session_state["prompt_reading"][0][2:], app.session_state["prompt_reading"][1]
    assert text == app.text_area(key="prompt_text").value and reading.n > 3


def test_another_sae_reads_the_same_text_at_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = read(monkeypatch, folder, "topk")
    app.selectbox(key="run").select("runs/abs_topk")
    succeed(app.run())
    (name, *_), reading = app.session_state["prompt_reading"]
    assert name == "runs/abs_topk" and "".join(reading.strings[reading.front :]).strip() == TEXT
    assert reading.grads is not None, "what was switched on stays on"
    # A visit elsewhere loses nothing.
    succeed(app.switch_page("views/features.py").run())
    succeed(app.switch_page("views/prompt.py").run())
    assert app.text_area(key="prompt_text").value == TEXT


def test_a_long_text_is_cut_and_the_page_says_so(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = launch(monkeypatch, folder, model=str(folder / "model"))
    app.switch_page("views/prompt.py").run()
    app.text_area(key="prompt_text").input("river " * 99 + "river")  # the model has 64 positions
    succeed(app.button(key="FormSubmitter:prompt_form-Read").click().run())
    assert [warning.value for warning in app.warning] == ["Only the first 64 tokens were read; 37 more are not shown."]
    (chart,) = [json.loads(item.proto.spec) for item in app.get("plotly_chart") if "heatmap" in item.proto.id]
    assert len(chart["layout"]["xaxis"]["labelalias"]) == 60, "as many tokens as a chart can name"


def test_saes_beside_each_other_read_the_same_activations(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = read(monkeypatch, folder, "topk")
    app.multiselect(key="prompt_beside").set_value(["runs/abs_topk"])
    succeed(app.run())
    _, reading = app.session_state["prompt_reading"]
    found = Workspace.scan(folder)
    for run, table in zip(("runs/topk", "runs/abs_topk"), app.dataframe):
        own = reading.through(found.run(run).sae)
        ranked, _ = rank(own, "telling", hide_dense=True, known=known(folder / run))
        shown = [(row["latent"], row["activation"]) for row in table.value.to_dict("records")]
        assert shown == [(r.latent, r.activation) for r in ranked[:14]]


def known(run: Path) -> Known:
    index = FeatureIndex(run)
    return Known.of(index.table(), index.d_sae, index.meta["tokens"])


def test_rankings_are_what_their_formulas_say(folder: Path) -> None:
    torch.manual_seed(0)
    sae = Workspace.scan(folder).run("runs/abs_topk").sae
    acts, grads = torch.randn(7, 32), torch.randn(7, 32)
    code = sae.encode(acts).detach()
    reading = Reading(list("abcdefg"), acts, grads, code, sae.decode(code), first=1)
    index = known(folder / "runs" / "abs_topk")
    dense = code.dense().double()
    for by in RANKINGS:
        expected: dict[tuple[int, int], float] = {}
        for position, latent in dense.nonzero().tolist():
            if position == 0:
                continue
            value = float(dense[position, latent])
            side = int(value < 0)
            share = abs(value) / max(index.maximum[side, latent], abs(value))
            bits = -math.log2(max(index.density[side, latent], 0.5 / index.tokens))
            effect = abs(value * float(sae.W_dec[latent].detach().double() @ grads[position].double()))
            score = {"telling": share * bits, "share": share, "activation": abs(value), "effect": effect}[by]
            key = latent, 1 - 2 * side
            expected[key] = max(expected.get(key, 0.0), score)
        found, hidden = rank(reading, by, index, sae.W_dec)
        assert {(r.latent, r.pole): r.score for r in found} == pytest.approx(expected, rel=1e-5) and not hidden
        assert [r.score for r in found] == pytest.approx(sorted(expected.values(), reverse=True))
        assert all(float(dense[r.position, r.latent]) == pytest.approx(r.activation) for r in found)
    (latent, pole), *_ = expected
    index.density[int(pole < 0), latent] = 0.11
    kept, hidden = rank(reading, "telling", index, hide_dense=True)
    often = {key for key in expected if index.density[int(key[1] < 0), key[0]] > 0.1}
    assert hidden == len(often) > 0 and {r[:2] for r in kept} == set(expected) - often
    with pytest.raises(UserError, match="needs gradients"):
        rank(dataclasses.replace(reading, grads=None), "effect", index, sae.W_dec)
    with pytest.raises(UserError, match="needs a feature index"):
        rank(reading, "telling")


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
