"""A latent's page beyond its index, and the Collections page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saelab.errors import UserError
from saelab.features.explanations import load
from saelab.workspace import Workspace, collections
from saelab.workspace.collections import Member, read_collections
from saelab.workspace.notes import rate, read_notes, write_note
from tests.features.test_explanations import FakeServer

ENTRY = Path(__file__).parents[2] / "app" / "streamlit_app.py"


@pytest.fixture
def desk(folder: Path, tmp_path: Path) -> Path:
    """A workspace to write into: two SAEs and their cache."""
    for name in ("cache", "runs/topk", "runs/abs_topk"):
        shutil.copytree(folder / name, tmp_path / name)
    return tmp_path


def launch(monkeypatch: pytest.MonkeyPatch, root: Path, model: str) -> AppTest:
    monkeypatch.setenv("SAELAB_APP_FOLDER", str(root))
    monkeypatch.setenv("SAELAB_APP_MODEL", model)
    app = AppTest.from_file(ENTRY, default_timeout=60)
    app.run()
    app.selectbox(key="run").select("runs/topk").run()
    return good(app)


def good(app: AppTest) -> AppTest:
    assert not app.exception, app.exception
    assert not app.error, app.error
    return app


def test_a_latent_is_looked_into(monkeypatch: pytest.MonkeyPatch, desk: Path, folder: Path) -> None:
    app = launch(monkeypatch, desk, str(folder / "model"))
    app.session_state["latent"] = 3
    good(app.switch_page("views/latent.py").run())
    good(app.segmented_control(key="latent_kind_1").set_value("groups").run())
    said = " ".join(caption.value for caption in app.caption)
    assert "**75% to 100%** of its firings" in said and "**0% to 25%**" in said
    good(app.segmented_control(key="latent_kind_1").set_value("top").run())
    assert "documents" in " ".join(caption.value for caption in app.caption)
    good(app.toggle(key="top_whole_1").set_value(True).run())
    good(app.text_area(key="pinned").input("the river runs past a mill").run())
    said = " ".join(caption.value for caption in app.caption)
    assert "of its largest in the corpus" in said or "It is silent here." in said
    good(app.toggle(key="latent_logits_1").set_value(True).run())
    app.session_state["latent"] = 4  # the text stays
    good(app.switch_page("views/latent.py").run())
    assert app.text_area(key="pinned").value == "the river runs past a mill"
    assert next(iter(app.session_state["visited"].values())).startswith("\\#3")


def test_a_collection_is_made_shown_and_steered(monkeypatch: pytest.MonkeyPatch, desk: Path) -> None:
    app = launch(monkeypatch, desk, "none")
    good(app.switch_page("views/collections.py").run())
    assert "no collection" in app.info[0].value
    collections.add(desk, "rivers", [Member("runs/topk", 3, 1, "the first"), Member("runs/topk", 5)])
    collections.add(desk, "rivers", [Member("runs/topk", 3), Member("gone", 1)])
    good(app.switch_page("views/collections.py").run())
    table = app.dataframe[0].value
    assert table["latent"].tolist() == [3, 5, 1] and table["note"].tolist() == ["the first", "", ""]
    assert app.button(key="c_ablate").disabled is False
    app.button(key="c_ablate").click().run()
    assert not app.exception
    collections.describe(desk, "rivers", " by the water ")
    collections.remove(desk, "rivers", [Member("gone", 1)])
    kept = read_collections(desk)["rivers"]
    assert kept.note == "by the water" and [m.latent for m in kept.members] == [3, 5]
    rows = collections.rows(kept, Workspace.scan(desk).runs)
    assert rows[0]["words"] and rows[0]["note"] == "the first" and "label_score" in rows[1]
    collections.delete(desk, "rivers")
    assert read_collections(desk) == {}
    with pytest.raises(UserError, match="a name"):
        collections.add(desk, " ", [])
    (desk / "collections.json").write_text("[1]")
    with pytest.raises(UserError, match="collections"):
        read_collections(desk)


def test_a_rating_and_a_label_do_not_disturb_each_other(tmp_path: Path) -> None:
    rate(tmp_path, 3, 4)
    write_note(tmp_path, 3, "a river")
    assert read_notes(tmp_path)[3] == {"label": "a river", "note": "", "rating": "4"}
    write_note(tmp_path, 3, "")
    assert read_notes(tmp_path)[3] == {"label": "", "note": "", "rating": "4"}
    rate(tmp_path, 3, 0)
    assert read_notes(tmp_path) == {}


def test_a_latent_is_explained_where_an_endpoint_is_set(monkeypatch: pytest.MonkeyPatch, desk: Path) -> None:
    server = FakeServer()
    try:
        app = launch(monkeypatch, desk, "none")
        app.session_state["latent"] = 3
        good(app.switch_page("views/latent.py").run())
        assert not [button for button in app.button if button.key == "latent_explain_1"]
        monkeypatch.setenv("SAELAB_APP_EXPLAIN", json.dumps({"base_url": server.url, "model": "fake-1"}))
        good(app.run())
        good(app.button(key="latent_explain_1").click().run())
        assert load(desk / "runs" / "topk")[3, 1]["text"] == "the word w3"
        assert "the word w3" in " ".join(item.value for item in app.markdown)
    finally:
        server.server.shutdown()
        server.server.server_close()
