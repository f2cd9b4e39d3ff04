"""What the app's tests share: the workspace with every variant, and a small one that a browser sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from seen import CHROMIUM, SWITCHES
from small_workspace import make_cache, make_index, make_model, make_run, make_workspace
from users import serve

from saelab.sae import VARIANTS
from saelab.sae.weights import load_metadata, load_sae, save


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace; read-only for tests."""
    return make_workspace(tmp_path_factory.mktemp("workspace"), list(VARIANTS))


@pytest.fixture(scope="session")
def sick_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small SAEs; one of them with three latents killed in three ways."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("browser")
    cache = make_cache(root, make_model(root / "model"))
    make_run(root / "signed", "abs_topk", cache)
    run = make_run(root / "sick", "topk", cache, k=4)
    sae = load_sae(run)
    with torch.no_grad():
        sae.W_enc[:, 0] *= 1e-3
        sae.b_enc[0] = 0.0
        sae.W_dec[1] = sae.W_dec[2]
        sae.b_enc[1] = sae.b_enc[3] = -100.0
    save(sae, run, load_metadata(run))
    for path in (root / "signed", run):
        make_index(path, cache)
    return root


# Not for the whole session: while Playwright runs, its event loop keeps other tests from starting theirs.
@pytest.fixture(scope="module")
def address(sick_folder: Path) -> Iterator[str]:
    """The app as a user starts it, on a free port."""
    with serve(sick_folder) as (port, _):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium found on PATH; install Debian's chromium to run the browser journeys")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.set_default_timeout(60_000)
    page.dialogs = []
    page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    page.outside = []
    page.on("request", lambda request: None if address in request.url else page.outside.append(request.url))
    yield page
    assert not page.dialogs, "a token ran as a script"
    assert page.locator("[data-testid=stException]").count() == 0
    page.close()
