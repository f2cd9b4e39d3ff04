"""One server and one Chromium for all journeys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from seen import CHROMIUM, SWITCHES
from users import serve


# Not for the whole session: while Playwright runs, its event loop keeps other tests from starting theirs.
@pytest.fixture(scope="package")
def address(sick_folder: Path) -> Iterator[str]:
    """The app as a user starts it, on a free port."""
    with serve(sick_folder) as (port, _):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium found on PATH; install Debian's chromium to run the browser journeys")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield chromium
        chromium.close()


@pytest.fixture(scope="package")
def window(browser: Any) -> Iterator[Any]:
    """One for all pages: in a new one the browser fetches and compiles the app's scripts again."""
    # Without animations, which take a third of the browser's time here: it draws without a GPU.
    window = browser.new_context(viewport={"width": 1440, "height": 1000}, reduced_motion="reduce")
    yield window
    window.close()


@pytest.fixture
def page(window: Any, address: str) -> Iterator[Any]:
    page = window.new_page()
    page.set_default_timeout(60_000)
    page.dialogs = []
    page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    page.outside = []
    page.on("request", lambda request: None if address in request.url else page.outside.append(request.url))
    yield page
    assert not page.dialogs, "a token ran as a script"
    assert page.locator("[data-testid=stException]").count() == 0
    page.close()
