"""Every page, through the entrypoint, on every variant and on folders that are empty or half done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streamlit.testing.v1 import AppTest

from saelab import viz
from saelab.evaluation import Stability
from saelab.features import FeatureIndex
from saelab.features.finding import WRITES, Finder
from saelab.features.search import catalogue
from saelab.sae import VARIANTS
from saelab.sweep import save_results, save_summary
from saelab.workspace.notes import read_notes

ENTRY = Path(__file__).parents[2] / "app" / "streamlit_app.py"
VIEWS = sorted(path.name for path in (ENTRY.parent / "views").glob("*.py"))
OF_THE_SAE = ("features.py", "latent.py", "health.py")  # without a model, the others look alike for every SAE


def launch(monkeypatch: pytest.MonkeyPatch, folder: Path, model: str | None = None) -> AppTest:
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(folder))
    if model:
        monkeypatch.setenv("SAELAB_APP_MODEL", model)
    else:
        monkeypatch.delenv("SAELAB_APP_MODEL", raising=False)
    app = AppTest.from_file(ENTRY, default_timeout=60)
    app.run()
    assert not app.exception, app.exception
    return app


# The pages ask an SAE whether it is signed and whether it pursues; these answer in every way.
KINDS = {"topk", "abs_topk", "matching_pursuit", "jump_relu"}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.minutes] * (name not in KINDS)) for name in VARIANTS]
)
def test_every_page_works_with_every_variant(monkeypatch: pytest.MonkeyPatch, folder: Path, variant: str) -> None:
    app = launch(monkeypatch, folder, model="none")
    app.selectbox(key="run").select(f"runs/{variant}")
    for view in VIEWS if variant == "topk" else OF_THE_SAE:
        app.switch_page(f"views/{view}").run()
        assert not app.exception, (view, app.exception)
        assert not app.error, (view, app.error)
        assert app.session_state["run"] == f"runs/{variant}"


def test_every_page_works_on_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    app = launch(monkeypatch, tmp_path)
    for view in VIEWS:
        app.switch_page(f"views/{view}").run()
        assert not app.exception, (view, app.exception)
        assert app.info, f"{view}: an empty folder must say what to do next"


def test_every_page_works_with_a_half_built_index(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "runs" / "topk", tmp_path / "run")
    (tmp_path / "run" / "features" / "examples.parquet").unlink()
    app = launch(monkeypatch, tmp_path, model="none")
    for view in (*OF_THE_SAE, "compare.py", "map.py", "overview.py"):
        app.switch_page(f"views/{view}").run()
        assert not app.exception and not app.error, (view, app.exception, app.error)
    for view, title in (("features", "Features"), ("latent", "Latent"), ("map", "Map"), ("health", "Health")):
        app.switch_page(f"views/{view}.py").run()
        assert "saelab index" in app.info[0].value and app.title[0].value == title


def test_pages_that_need_a_model_say_so(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = launch(monkeypatch, folder, model="none")
    for view in ("prompt", "steering"):
        app.switch_page(f"views/{view}.py").run()
        assert "needs the language model" in app.info[0].value, view


def test_search_filters_and_opens(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = launch(monkeypatch, folder, model="none")
    app.selectbox(key="run").select("runs/abs_topk")
    app.switch_page("views/features.py").run()
    assert len(app.dataframe[0].value) == 96  # two poles of 48 latents
    app.selectbox(key="where").select("fires on")
    app.text_input(key="q").input("river").run()
    found = app.dataframe[0].value
    assert 0 < len(found) < 96
    words = FeatureIndex(folder / "runs" / "abs_topk")
    for latent, pole, share in zip(found["latent"], found["pole"], found["share"]):
        row = words.latent(latent, 1 if pole == "+" else -1)
        assert any("river" in word for word in (*row["words"], *row["top_tokens"])) and share >= 0
    app.text_input(key="q").input("<script>").run()
    assert not app.exception
    app.selectbox(key="where").select("what it writes")
    app.text_input(key="q").input("river").run()
    assert not app.exception
    writing = Finder(words).find("river", WRITES)
    if len(writing):
        assert app.dataframe[0].value["latent"].tolist() == writing["latent"].tolist()


def test_explanations_are_shown_and_searched(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs" / "abs_topk", tmp_path / "run")
    score = {"accuracy": 0.9, "balanced_accuracy": 0.83, "guess_nothing": 0.6}
    about = {"latent": 7, "pole": -1, "text": "words near **water**", "explainer": "fake-1", "judge": "fake-1"}
    rows = [{**about, "detection": score, "fuzzing": {**score, "balanced_accuracy": None}}]
    (tmp_path / "run" / "explanations.json").write_text(json.dumps(rows))
    app = launch(monkeypatch, tmp_path, model="none")
    app.switch_page("views/features.py").run()
    app.text_input(key="q").input("WORDS near").run()
    assert not app.exception, app.exception
    found = app.dataframe[0].value
    # Others fire on "near".
    assert (found["latent"].iloc[0], found["explanation"].iloc[0]) == (7, "words near **water**")
    app.session_state["latent"] = 7
    app.switch_page("views/latent.py").run()
    shown = " ".join(item.value for item in (*app.markdown, *app.caption))
    assert r"words near \*\*water\*\*" in shown
    assert "detection 83%, fuzzing –" in shown and "answering no to everything 60%" in shown


def test_a_link_leads_to_its_latent(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(folder))
    app = AppTest.from_file(ENTRY, default_timeout=60)
    app.query_params["run"], app.query_params["latent"], app.query_params["pole"] = "runs/gated", "7", "1"
    app.switch_page("views/latent.py").run()
    assert not app.exception and app.session_state["run"] == "runs/gated"
    assert "#7" in app.title[0].value
    # What is no number is said, and no other latent passes for it.
    for latent in ("1e9", "--5", "-5", "²", "9" * 5000, "48"):
        app = AppTest.from_file(ENTRY, default_timeout=60)
        app.query_params["run"], app.query_params["latent"], app.query_params["pole"] = "runs/gated", latent, "7"
        app.switch_page("views/latent.py").run()
        assert not app.exception and not app.error
        assert len(app.warning) == 1 and "latents 0 to 47" in app.warning[0].value
        assert app.query_params["pole"] == "1"


def test_a_link_to_an_sae_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(folder))
    for name, views in {"../../etc": ["latent.py"], "runs/nonexist": VIEWS}.items():
        app = AppTest.from_file(ENTRY, default_timeout=60)
        app.query_params["run"], app.query_params["latent"] = name, "3"
        for view in views:
            app.switch_page(f"views/{view}").run()
            assert not app.exception and app.session_state["run"] is None
            assert [name in error.value.replace("\\", "") for error in app.error] == [True], (view, app.error)
            assert app.query_params["run"] == name, "the address stays, for the reader to correct"
    app.selectbox(key="run").select("runs/gated")
    app.run()
    assert not app.error and app.query_params["run"] == "runs/gated"


def test_a_damaged_run_harms_no_other(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    for name in ("good", "bad_index", "bad_weights", "bad_evaluation", "bad_log", "bad_config"):
        shutil.copytree(folder / "runs" / "topk", tmp_path / name)
    write_evaluation(tmp_path / "good", fvu=0.5, l0=4.0)
    (tmp_path / "bad_index" / "features" / "features.parquet").write_bytes(b"torn")
    weights = tmp_path / "bad_weights" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "bad_evaluation" / "evaluation.json").write_text('{"metrics": [1]}')
    (tmp_path / "bad_log" / "metrics.jsonl").write_text("{torn}\n")
    (tmp_path / "bad_config" / "cfg.json").write_text('{"metadata": 3}')
    app = launch(monkeypatch, tmp_path, model="none")
    app.selectbox(key="run").select("good")
    for view in (*OF_THE_SAE, "compare.py", "overview.py", "training.py"):
        app.switch_page(f"views/{view}").run()
        assert not app.exception, (view, app.exception)
        damaged = [error.value.replace("\\", "") for error in app.error]
        assert all(("bad_" in text and "damaged" in text) or "not JSON" in text for text in damaged), (view, damaged)
        if view == "overview.py":
            states = dict(zip(app.dataframe[0].value["run"], app.dataframe[0].value["state"]))
            assert states.pop("good") == "ready" and states.pop("bad_index") == "ready"
            assert set(states.values()) == {"damaged, see above"} and len(damaged) == len(states) == 4
            assert len(app.get("plotly_chart")) == 2
        if view == "training.py":
            assert len(damaged) == 1 and len(app.metric) == 1
        if view == "latent.py":
            assert any("My label" in item.label for item in app.text_input), "the form for notes is there"
            assert app.main.get("dataframe")[-1].value["SAE"].tolist() == ["bad_log", "bad_evaluation"][::-1]


def write_evaluation(run: Path, split: str = "held_out", **values: float) -> None:
    """An ``evaluation.json`` with these numbers and intervals of 0.1 around them."""
    metrics = {
        name: {"value": v, "low": v - 0.1, "high": v + 0.1, "n": 9, "unit": "token"} for name, v in values.items()
    }
    (run / "evaluation.json").write_text(json.dumps({"metrics": metrics, "settings": {"split": split, "seed": 0}}))


def test_each_pole_of_a_signed_latent_has_its_own_label(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "runs" / "abs_topk", tmp_path / "run")
    path = tmp_path / "run" / "features" / "features.parquet"
    table = pq.read_table(path)
    frame = table.select(["latent", "pole"]).to_pandas()
    labels = [f"label {n}{'+' if pole > 0 else '-'}" for n, pole in zip(frame["latent"], frame["pole"])]
    field = table.schema.field("label")
    table = table.set_column(table.schema.get_field_index("label"), field, pa.array(labels, field.type))
    about = pq.ParquetFile(path).metadata.metadata
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({key: value for key, value in about.items() if key != b"ARROW:schema"})
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(tmp_path))
    for pole, asked in (("1", "label 7+"), ("-1", "label 7-")):
        app = AppTest.from_file(ENTRY, default_timeout=60)
        app.query_params["run"], app.query_params["latent"], app.query_params["pole"] = "run", "7", pole
        app.switch_page("views/latent.py").run()
        assert not app.exception and not app.error, app.error[0].value
        assert viz.markdown(asked) in app.title[0].value, "the title is that of the pole that was asked for"
        shown = [item.value for item in app.markdown]
        for label in ("label 7+", "label 7-"):
            assert any(text.startswith(f"**{viz.markdown(label)}**") for text in shown), (label, shown)
        near = next(table.value for table in app.dataframe if {"cosine", "label", "pole"} <= set(table.value.columns))
        assert all(row.endswith("+" if sign == "+" else "-") for row, sign in zip(near["label"], near["pole"]))
        assert set(near["pole"]) == {"+", "−"} or len(near) < 3


def test_notes_are_saved_to_the_run(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs" / "topk", tmp_path / "run")
    app = launch(monkeypatch, tmp_path, model="none")
    app.session_state["latent"] = 5
    app.switch_page("views/latent.py").run()
    app.text_input(key="note_label_5").input("**water**")
    app.text_area(key="note_text_5").input("fires near rivers")
    app.button(key="FormSubmitter:notes_5-Save").click().run()
    assert not app.exception
    assert read_notes(tmp_path / "run") == {5: {"label": "**water**", "note": "fires near rivers"}}
    app.run()
    assert r"\*\*water\*\*" in app.title[0].value


def test_numbers_stand_beside_controls_and_other_seeds(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "runs" / "topk", tmp_path / "run")
    labels = {"mean_f1": {"value": 0.25}, "f1_quantiles": [0.0] * 60 + [1.0] * 41}
    settings = {"split": "held_out", "seed": 0}
    content = {
        "metrics": {"fvu": {"value": 0.25, "n": 100, "low": None, "high": None}},
        "controls": {
            "untrained": {"what": "<i>untrained</i>", "metrics": {"fvu": {"value": 0.75}}, "tasks": {"labels": labels}},
            "random_transformer": {"what": "x", "cannot": "the run does not say how"},
        },
        "settings": settings,
        "density_histogram": {"tokens": 100},
    }
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(content))
    Stability(["other"], [1] + [0] * 47, 0.0).save(tmp_path / "run")
    app = launch(monkeypatch, tmp_path, model="none")
    table = app.dataframe[1].value
    assert table["SAE"].tolist() == [0.25] and table["untrained"].tolist() == [0.75]
    captions = " ".join(caption.value for caption in app.caption)
    assert "the run does not say how" in captions and r"\<i\>" in captions
    app.session_state["latent"] = 0
    app.switch_page("views/latent.py").run()
    assert not app.exception
    captions = " ".join(caption.value for caption in app.caption)
    assert "1 of 1 other seed have this latent" in captions


def test_a_sweep_is_shown_with_its_members(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    rows = []
    for i, name in enumerate(("topk", "gated")):
        shutil.copytree(folder / "runs" / name, tmp_path / "sweep" / name)
        known = {"name": name, "variant": name, "d_sae": 48, "seed": 0, "lr": 1e-3, "options": "{}", "step": 24}
        rows.append({**known, "status": "finished", "l0": 4.0 + i, "fvu": 0.5 - 0.1 * i, "dead_fraction": 0.0})
    tried = [{"lr": 10.0 ** -(3 + i), "fvu": 0.5 + i, "l0": 4.0, "status": "finished"} for i in range(2)]
    rows[0]["tried"] = json.dumps([*tried, {"lr": 1.0, "fvu": None, "l0": None, "status": "diverged", "step": 2}])
    rows.append({"name": "<b>lost</b>", "variant": "topk", "status": "diverged", "message": "FVU is nan"})
    save_results(rows, tmp_path / "sweep")
    means = {"name": "topk", "seeds": 3, "documents": 20, "l0": 4.0, "fvu": 0.4567, "shared_latents": 0.25}
    difference = {"a": "topk", "b": "gated", "difference": 0.1, "low": 0.05, "high": 0.15, "verdict": "b is better"}
    untold = {"a": "topk", "b": "relu", "difference": 0.2, "verdict": "cannot say: L0 differs by +9%"}
    save_summary([means], [difference, untold], tmp_path / "sweep")
    app = launch(monkeypatch, tmp_path, model="none")
    app.switch_page("views/training.py").run()
    assert not app.exception and not app.error, (app.exception, app.error)
    table = app.dataframe[0].value
    assert table["name"].tolist() == ["topk", "gated", "<b>lost</b>"] and table["message"][2] == "FVU is nan"
    assert "ce_loss_recovered_zero" not in table
    means, differences = app.dataframe[1].value, app.dataframe[2].value
    assert means["fvu"].tolist() == [0.4567] and "lr" not in means and "cpu_seconds" not in means
    assert differences["verdict"].tolist() == ["b is better", untold["verdict"]]
    captions = [caption.value for caption in app.caption]
    assert any("Of 1 such intervals" in text for text in captions)
    assert any("Learning rates tried" in text for text in captions) and r"topk\: 1 diverged at step 2" in captions
    app.button(key="training_members").click().run()
    assert not app.exception and app.multiselect(key="training_runs").value == ["sweep/gated", "sweep/topk"]
    assert sorted(metric.label for metric in app.metric) == ["sweep/gated", "sweep/topk"]


def test_the_shipped_checkpoints_open_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    app = launch(monkeypatch, ENTRY.parents[1] / "checkpoints", model="none")
    assert not app.error and len(app.dataframe[0].value) == len(app.selectbox(key="run").options) == 15
    for run in ("topk_16384", "abs_topk", "topk_mlp"):
        app.selectbox(key="run").select(run)
        for view in ("features", "latent", "health", "overview"):
            app.switch_page(f"views/{view}.py").run()
            assert not app.exception and not app.error, (run, view, app.exception, app.error)
            assert app.session_state["run"] == run
            # Nothing tells the reader to make something first.
            assert not any("saelab" in item.value for item in app.info), (run, view, app.info)


def test_two_sessions_keep_their_own_state(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    chosen = (("runs/gated", 3, "river"), ("runs/topk", 5, "mill"))
    apps = [launch(monkeypatch, folder, model=str(folder / "model")) for _ in chosen]
    for app, (run, latent, word) in zip(apps, chosen):
        app.selectbox(key="run").select(run)
        app.switch_page("views/features.py").run()
        app.text_input(key="q").input(word).run()
        app.session_state["steer_pick"] = (run, latent, 1)
        app.switch_page("views/steering.py").run()
        app.text_area(key="steering_prompt").input(word)
        app.session_state["latent"] = latent
        app.switch_page("views/latent.py").run()
    for app, (run, latent, word) in zip(apps, chosen):
        app.run()
        assert not app.exception and app.session_state["run"] == run
        assert f"#{latent}" in app.title[0].value
        app.switch_page("views/features.py").run()
        assert app.text_input(key="q").value == word
        app.switch_page("views/steering.py").run()
        assert [pick.latent for pick in app.session_state["steering_picks"][run]] == [latent]
        assert list(app.session_state["steering_picks"]) == [run]
        assert not app.exception and not app.error


def test_examples_of_one_role_of_a_chat(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs" / "topk", tmp_path / "run")
    path = tmp_path / "run" / "features" / "examples.parquet"
    table = pq.read_table(path)
    frame = table.select(["latent", "rank"]).to_pandas()
    odd = frame["latent"] % 2 == 1  # odd latents fire on the user, even ones on both
    roles = ["user" if on or rank % 2 else "assistant" for on, rank in zip(odd, frame["rank"])]
    pq.write_table(table.set_column(table.schema.get_field_index("role"), "role", pa.array(roles)), path)
    app = launch(monkeypatch, tmp_path, model="none")
    app.switch_page("views/features.py").run()
    app.pills(key="role").set_value("user").run()
    assert not app.exception and not app.error
    shown = app.session_state["role"]
    found = catalogue(FeatureIndex(tmp_path / "run"))
    assert shown == "user" and set(found[found["role"] == "user"]["latent"]) >= set(range(1, 48, 2)) - set(dead(found))
    live = int(found[(found["latent"] % 2 == 0) & (found["count"] > 8)]["latent"].iloc[0])
    app.session_state["latent"] = live
    app.switch_page("views/latent.py").run()
    for role, other in (("user", "assistant"), ("assistant", "user")):
        app.segmented_control(key="latent_role_1").set_value(role).run()
        assert not app.exception and not app.error
        text = " ".join(str(element.proto) for element in app.main if "<br>" in str(element.proto))
        assert f"<br>{role}" in text and f"<br>{other}" not in text


def dead(table: Any) -> list[int]:
    return table[table["count"] == 0]["latent"].tolist()
