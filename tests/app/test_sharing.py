"""What the sessions of a server share: each object is frozen, locked, or never changed by a page."""

from __future__ import annotations

import ast
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_pages import ENTRY, VIEWS, launch

from saelab.workspace import Workspace

# Every function whose result all sessions get, and why that is safe.
SHARED = {
    "_scan": "a frozen dataclass",
    "_opened": "a Run: what it reads is read once and not changed; its index reads behind a lock",
    "_catalogue": "a table that no page changes (tested below)",
    "_known": "arrays that no page changes (tested below)",
    "_finder": "reads the shared table and an index; what it keeps of a search is not changed",
    "_latent_map": "a table that pages only draw",
    "_matchings": "changed behind its own lock",
    "model_lock": "the lock itself",
    "jobs": "changed behind its own lock",
    "_model": "used behind the lock",
    "_lens": "tensors that nothing changes",
}


def shared(path: Path) -> list[str]:
    """The functions of a file that Streamlit calls once for all sessions without copying the result."""
    return [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("cache_resource" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def test_every_shared_object_says_why_it_is_safe() -> None:
    found = {name for path in ENTRY.parent.rglob("*.py") for name in shared(path)}
    assert found == set(SHARED), "say in SHARED why sessions may share it"


def test_a_scan_cannot_be_changed(folder: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Workspace.scan(folder).runs = {}  # pyright: ignore


def test_pages_change_no_table_that_others_see(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = launch(monkeypatch, folder, model=str(folder / "model"))
    loaders = sys.modules["loaders"]
    run = Workspace.scan(folder).run("runs/abs_topk")
    before = state(loaders, run)
    app.selectbox(key="run").select("runs/abs_topk")
    for view in VIEWS:
        app.switch_page(f"views/{view}").run()
        assert not app.exception, (view, app.exception)
        if view == "features.py":
            app.text_input(key="q").input("river").run()
        if view == "prompt.py":
            app.button(key="FormSubmitter:prompt_form-Read").click().run()
            assert not app.error, app.error
    assert state(loaders, run) == before


def state(loaders: Any, run: Any) -> tuple[Any, ...]:
    """What is in the shared table, and in the arrays that the Prompt page ranks with."""
    table, known = loaders.catalogue(run), loaders.known(run)
    arrays = known.maximum.tobytes(), known.density.tobytes()
    return tuple(table.columns), pd.util.hash_pandas_object(table).sum(), arrays
