"""Every page, through the entrypoint, on every variant and on folders that are empty or half done."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saelab.sae import VARIANTS

ENTRY = Path(__file__).parents[2] / "app" / "streamlit_app.py"
VIEWS = sorted(path.name for path in (ENTRY.parent / "views").glob("*.py"))


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


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_page_works_with_every_variant(
    monkeypatch: pytest.MonkeyPatch, folder: Path, variant: str, view: str
) -> None:
    app = launch(monkeypatch, folder)
    app.selectbox(key="run").select(f"runs/{variant}")
    app.switch_page(f"views/{view}").run()
    assert not app.exception, app.exception
    assert not app.error, app.error
    assert app.session_state["run"] == f"runs/{variant}"


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_works_on_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, view: str) -> None:
    app = launch(monkeypatch, tmp_path)
    app.switch_page(f"views/{view}").run()
    assert not app.exception, app.exception
    assert app.info, "an empty folder must say what to do next"
