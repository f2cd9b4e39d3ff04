"""SAEs of other tools in the folder: listed, opened, searched and indexed like our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_pages import OF_THE_SAE, launch

from saelab import viz
from saelab.cli import main
from saelab.interop import export, read
from saelab.sae.weights import load_metadata, load_sae
from saelab.workspace import Workspace
from tests.hardening.vendors import VENDORS
from tests.interop import collected

FORMATS = {"saelens": "topk", "sparsify": "abs_topk", "dictionary-learning": "topk"}


@pytest.fixture(scope="module")
def strangers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cache and model, with one SAE written as each tool writes it, and an index of each."""
    root = tmp_path_factory.mktemp("strangers")
    (root / "cache").mkdir()
    for file in (folder / "cache").iterdir():
        (root / "cache" / file.name).hardlink_to(file)
    for name, variant in FORMATS.items():
        run = folder / "runs" / variant
        # Only SAELens' files say where in the model the SAE belongs.
        metadata = load_metadata(run)
        about = {key: metadata[key] for key in ("model_name", "hook_name")} if name == "saelens" else {}
        export(load_sae(run), root / name, name, about)
        main(["index", str(root / name), "--cache", str(root / "cache"), "--model", "none"])
    return root


def test_each_tool_is_recognised(strangers: Path, folder: Path) -> None:
    found = Workspace.scan(strangers)
    assert {*FORMATS} <= {*found.runs}
    for name, variant in FORMATS.items():
        run = found.run(name)
        assert run.is_foreign and run.has_weights and run.has_index
        acts = torch.randn(5, 32)
        ours = load_sae(folder / "runs" / variant)
        assert torch.allclose(run.sae(acts), ours(acts), atol=1e-4)
        # What the tool did not record is known from the cache the index was made on.
        assert run.metadata["hook_name"] == "blocks.0.hook_resid_post"
        assert found.cache_of(run) is not None


@pytest.mark.parametrize("name", FORMATS)
def test_every_page_works_with_another_tools_sae(monkeypatch: pytest.MonkeyPatch, strangers: Path, name: str) -> None:
    app = launch(monkeypatch, strangers, model="none")
    app.selectbox(key="run").select(name)
    for view in (*OF_THE_SAE, "overview.py", "compare.py"):
        app.switch_page(f"views/{view}").run()
        assert not app.exception and not app.error, (view, app.exception, app.error)
        assert app.session_state["run"] == name


def test_a_text_is_read_with_another_tools_sae(monkeypatch: pytest.MonkeyPatch, strangers: Path, folder: Path) -> None:
    app = launch(monkeypatch, strangers, model=str(folder / "model"))
    app.selectbox(key="run").select("sparsify")
    app.switch_page("views/prompt.py").run()
    app.text_area(key="prompt_text").input("the river runs past")
    app.button(key="FormSubmitter:prompt_form-Read").click().run()
    assert not app.exception and not app.error, (app.exception, app.error)
    assert len(app.dataframe) == 1 and len(app.dataframe[0].value), "active latents of a token"


def test_an_sae_of_unknown_origin_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    export(load_sae(folder / "runs" / "topk"), tmp_path / "plain", "sparsify", {})
    app = launch(monkeypatch, tmp_path, model=str(folder / "model"))
    for view in ("prompt", "steering"):
        app.switch_page(f"views/{view}.py").run()
        assert not app.exception, (view, app.exception)
        said = " ".join(item.value for item in (*app.info, *app.error))
        assert "hook point" in said, (view, said)


def test_what_cannot_be_read_is_one_row(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    export(load_sae(folder / "runs" / "topk"), tmp_path / "good", "sparsify", {})
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "sae.safetensors").write_bytes(b"not safetensors")
    (tmp_path / "torn" / "cfg.json").write_text(json.dumps({"k": 4}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cfg.json").write_text("{")
    (tmp_path / "broken" / "sae_weights.safetensors").write_bytes(b"")
    app = launch(monkeypatch, tmp_path, model="none")
    said = " ".join(error.value for error in app.error)
    assert len(app.error) == 2 and "is not a safetensors file" in said and "is damaged" in said
    assert app.selectbox(key="run").options == ["good · topk"]
    states = dict(zip(app.dataframe[0].value["run"], app.dataframe[0].value["state"]))
    assert states["good"] == "from sparsify"
    assert states["torn"] == states["broken"] == "damaged, see above"


def test_the_hubs_cache_is_listed_with_its_transcoders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("res", "transcoders"):
        repository = collected.cached(tmp_path, f"google/gemma-scope-2b-pt-{name}")
        collected.gemma_scope(repository / "layer_3" / "width_16k" / "average_l0_9")
        collected.into_blobs(repository, repository)
    app = launch(monkeypatch, tmp_path, model="none")
    assert not app.error
    assert sorted("-res/" in name for name in app.selectbox(key="run").options) == [False, True]
    states = dict(zip(app.dataframe[0].value["run"], app.dataframe[0].value["state"]))
    assert {state for name, state in states.items() if "transcoders" in name} == {"from gemma_scope"}, states


def test_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    collected.gemma_scope(tmp_path / "elsewhere" / "one")
    (tmp_path / "root" / "two").mkdir(parents=True)
    (tmp_path / "root" / "two" / "params.npz").symlink_to(tmp_path / "elsewhere" / "one" / "params.npz")
    (tmp_path / "root" / "three").symlink_to(tmp_path / "elsewhere")
    assert not Workspace.scan(tmp_path / "root").runs


def test_notes_are_on_every_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notes = read(collected.saelens(tmp_path / "sae", normalize_activations="constant_norm_rescale")).notes
    app = launch(monkeypatch, tmp_path, model="none")
    for view in ("overview.py", "steering.py", "help.py"):
        app.switch_page(f"views/{view}").run()
        assert any(viz.markdown(notes[0]) in caption.value for caption in app.sidebar.caption), view


def test_an_imported_label_is_shown_with_its_source(
    monkeypatch: pytest.MonkeyPatch, strangers: Path, tmp_path: Path
) -> None:
    line = {"modelId": "tiny", "layer": "0-res-xy", "index": "5", "description": "rivers *and* seas"}
    made = {"explanationModelName": "gpt-4o-mini", "typeName": "oai_token-act-pair"}
    (tmp_path / "labels.jsonl").write_text(json.dumps({**line, **made}))
    main(["labels", str(strangers / "saelens"), str(tmp_path / "labels.jsonl")])
    app = launch(monkeypatch, strangers, model="none")
    app.session_state["latent"] = 5
    app.selectbox(key="run").select("saelens")
    app.switch_page("views/latent.py").run()
    assert not app.exception and not app.error, (app.exception, app.error)
    assert "rivers" in app.title[0].value
    said = " ".join(caption.value for caption in app.caption)
    assert "imported label" in said and viz.markdown("gpt-4o-mini") in said and viz.markdown("0-res-xy") in said


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_page_works_with_every_format(monkeypatch: pytest.MonkeyPatch, vendor: str, tmp_path: Path) -> None:
    path = VENDORS[vendor](tmp_path / vendor)
    app = launch(monkeypatch, tmp_path, model="none")
    assert app.selectbox(key="run").value == path.relative_to(tmp_path).as_posix()
    notes = Workspace.scan(tmp_path).run(app.selectbox(key="run").value).notes
    said = ""
    for view in ("overview.py", "features.py", "steering.py"):
        app.switch_page(f"views/{view}").run()
        assert not app.exception and not app.error, (view, app.exception, app.error)
        said += " ".join(caption.value for caption in app.caption)
    assert all(viz.markdown(note) in said for note in notes), notes
