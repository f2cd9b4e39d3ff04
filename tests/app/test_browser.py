"""Journeys in a real browser: find a latent and steer with it; see why latents are dead; hostile tokens stay inert."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_workspace import make_cache, make_index, make_model, make_run
from users import serve

from saelab import checkpoint
from saelab.workspace import Workspace

pytestmark = pytest.mark.browser
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SWITCHES = (  # noqa: SIM905
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small SAEs; one of them with three latents killed in three ways."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("browser")
    cache = make_cache(root, make_model(root / "model"))
    make_run(root / "signed", "abs_topk", cache)
    run = make_run(root / "sick", "topk", cache, k=4)
    sae = checkpoint.load_sae(run)
    with torch.no_grad():
        sae.W_enc[:, 0] *= 1e-3
        sae.b_enc[0] = 0.0
        sae.W_dec[1] = sae.W_dec[2]
        sae.b_enc[1] = sae.b_enc[3] = -100.0
    checkpoint.save_sae(sae, run, checkpoint.load_metadata(run))
    for path in (root / "signed", run):
        make_index(path, cache)
    return root


@pytest.fixture(scope="module")
def address(workspace: Path) -> Iterator[str]:
    """The app as a user starts it, on a free port."""
    with serve(workspace) as (port, _):
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


def settle(page: Any) -> None:
    page.wait_for_timeout(300)
    page.wait_for_function("!document.querySelector('[data-testid=stStatusWidget]')")
    page.wait_for_timeout(300)


def test_find_a_latent_by_text_look_at_it_and_steer_with_it(page: Any, address: str) -> None:
    page.goto(f"{address}/features?run=signed")
    page.get_by_label("Search", exact=True).fill("river")
    page.keyboard.press("Enter")
    settle(page)
    page.locator(".st-key-features_preview_open button").click()
    page.get_by_text("Positive pole").wait_for()
    page.get_by_text("Negative pole").wait_for()
    settle(page)
    assert re.search(r"run=signed&latent=\d+&pole=-?1", page.url), "the address must lead back to this latent"
    assert page.locator(".sl-strip").count() >= 2
    latent = re.search(r"latent=(\d+)", page.url)[1]
    page.locator(".st-key-latent_steer button").click()
    page.get_by_text("What the model says").wait_for()
    settle(page)
    assert page.get_by_text(re.compile(rf"^#{latent}( −)?$")).count() >= 1
    page.get_by_label("Prompt", exact=True).fill("the river runs past")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("random control").wait_for()
    settle(page)
    texts = page.locator(".sl-strip").all_inner_texts()
    assert len(texts) == 3 and all(text.strip() for text in texts)


def test_which_latents_are_dead_and_why(page: Any, address: str, workspace: Path) -> None:
    page.goto(f"{address}/health?run=sick")
    page.get_by_role("tab", name=re.compile("Dead")).click()
    settle(page)
    facts = page.locator(".sl-facts").first.inner_text()
    assert "encoder collapsed" in facts and "duplicate" in facts and "bias too low" in facts
    assert Workspace.scan(workspace).run("sick").load().d_sae == 48


def test_hostile_tokens_are_shown_and_do_nothing(page: Any, address: str) -> None:
    for latent in (0, 3, 7):
        page.goto(f"{address}/latent?run=signed&latent={latent}&pole=1")
        page.get_by_text("Positive pole").wait_for()
        settle(page)
        text = " ".join(page.locator(".sl-strip").all_inner_texts())
        assert "\u202e" not in text and "\x07" not in text
        assert page.locator(".sl-strip script, .sl-strip img, .sl-strip a, .sl-strip strong").count() == 0
        if "<script>alert(1)</script>" in text and "⟨U+202E⟩" in text:
            return
    pytest.fail("no hostile token was shown, so nothing was tested")


def test_nothing_is_fetched_from_elsewhere(page: Any, address: str) -> None:
    page.goto(f"{address}/?run=signed")
    page.get_by_text("Sparsity against fidelity").wait_for()
    settle(page)
    assert [url for url in page.outside if not url.startswith(("data:", "blob:"))] == []


def test_pages_can_be_walked_with_the_keyboard(page: Any, address: str) -> None:
    page.goto(f"{address}/features?run=signed")
    page.get_by_label("Search", exact=True).wait_for()
    settle(page)
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "(document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || '').trim()"
            )
        )
    assert {"Overview", "Latent", "Steering"} <= {name.split("\n")[-1] for name in seen}
    assert any("Search" in name for name in seen)


# Every visible text that stands out too little from what lies behind it: [text, colour, background, ratio].
FAINT = """() => {
  const parts = (colour) => {
    const found = colour.match(/[\\d.]+/g).map(Number);
    const unit = colour.startsWith('color(') ? 255 : 1;
    return [found[0] * unit, found[1] * unit, found[2] * unit, found.length > 3 ? found[3] : 1];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const layer = parts(getComputedStyle(e).backgroundColor);
      if (layer[3] > 0) layers.push(layer);
      if (layer[3] === 1) break;
    }
    const paper = parts(getComputedStyle(document.querySelector('.stApp')).backgroundColor);
    return layers.reverse().reduce((below, layer) => over(layer, below), paper.slice(0, 3));
  };
  const light = (colour) => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    if (!text || !element.getClientRects().length) continue;
    // What is switched off may be faint; charts have their own test, canvases hold no text.
    const off = 'script, style, noscript, svg, canvas, [disabled], [aria-disabled=true], [aria-hidden=true]';
    if (element.closest(off)) continue;
    const style = getComputedStyle(element);
    if (style.visibility === 'hidden') continue;
    const colour = parts(style.color), back = behind(element);
    for (let e = element; e; e = e.parentElement) colour[3] *= Number(getComputedStyle(e).opacity);
    if (colour[3] === 0) continue;
    const [a, b] = [light(over(colour, back)), light(back)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), icon = element.closest('[data-testid=stIconMaterial]');
    const large = icon || size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) faint.push([text.slice(0, 30), style.color, back.map(Math.round).join(), ratio]);
  }
  return faint;
}"""
PAGES = ("", "training", "compare", "features", "latent", "health", "prompt", "steering")


def faint(page: Any) -> list[Any]:
    """What stays below level AA once the page is drawn: styles may arrive a moment after the text."""
    found = page.evaluate(FAINT)
    for _ in range(20):
        if not found:
            break
        page.wait_for_timeout(250)
        found = page.evaluate(FAINT)
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_the_contrast_of_level_aa(browser: Any, address: str, theme: str) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 1000}, color_scheme=theme)
    page.set_default_timeout(60_000)
    for name in PAGES:
        page.goto(f"{address}/{name}?run=sick")
        page.locator("h1").first.wait_for()
        settle(page)
        ground = page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 18, 22)"}[theme]
        assert faint(page) == [], name
    # The test can see: a title half as strong is found.
    page.evaluate("document.querySelector('h1').style.opacity = 0.3")
    assert [found[0] for found in page.evaluate(FAINT)] == ["Steering"]
    page.close()
