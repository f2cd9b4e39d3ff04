"""Journeys in a real browser: find and steer, dead latents and why, hostile tokens, two tabs side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from seen import redraw, settle, visible

from saelab.workspace import Workspace

pytestmark = pytest.mark.browser


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
    assert page.get_by_text(re.compile(rf"^#{latent}( −)?( ·.*)?$")).count() >= 1
    page.get_by_label("Prompt", exact=True).fill("the river runs past")
    page.get_by_label("new tokens").fill("5")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("random control", exact=True).wait_for()
    settle(page)
    texts = page.locator(".sl-strip").all_inner_texts()
    assert len(texts) == 5 and all(text.strip() for text in texts)
    assert page.get_by_text("under the unsteered model").count() == 5
    assert page.locator(".st-key-stop_steering button").count() == 0


def test_stop_stops_and_keeps_what_was_written(page: Any, address: str) -> None:
    page.goto(f"{address}/steering?run=signed")
    page.get_by_text("What the model says").wait_for()
    settle(page)
    page.get_by_role("button", name="Add", exact=True).click()
    settle(page)
    page.get_by_label("new tokens").fill("50")
    for factor in ("×0.25", "×1.5", "×4"):
        page.get_by_role("button", name=factor, exact=True).click()
    page.get_by_role("button", name="Generate").click()
    # In the page, as soon as something is written: a click from here may come when all is written. The app's head has
    # another button of that name, of Streamlit.
    page.wait_for_function(
        """() => {
            const stop = document.querySelector(".st-key-stop_steering button");
            const written = [...document.querySelectorAll(".sl-strip")].some(e => e.innerText.trim().length > 5);
            if (stop && written) stop.click();
            return stop && written;
        }"""
    )
    stop = page.locator(".st-key-stop_steering button")
    stop.wait_for(state="detached")
    settle(page)
    assert page.get_by_text("under the unsteered model").count() < 8, "nothing was left to stop"
    assert any(text.strip() for text in page.locator(".sl-strip").all_inner_texts()), "what was written stays"
    page.get_by_label("new tokens").fill("3")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("document.body.innerText.split('under the unsteered model').length == 9", timeout=60_000)


def test_which_latents_are_dead_and_why(page: Any, address: str, sick_folder: Path) -> None:
    page.goto(f"{address}/health?run=sick")
    page.get_by_role("tab", name=re.compile("Dead")).click()
    settle(page)
    facts = page.locator(".sl-facts").first.inner_text()
    assert "encoder collapsed" in facts and "duplicate" in facts and "bias too low" in facts
    assert Workspace.scan(sick_folder).run("sick").sae.d_sae == 48


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


@pytest.fixture
def tabs(browser: Any, address: str) -> Iterator[list[Any]]:
    """Two tabs of one window, on latents of two SAEs."""
    window = browser.new_context(viewport={"width": 1440, "height": 1000}, reduced_motion="reduce")
    found = [window.new_page() for _ in range(2)]
    for tab, where in zip(found, ("run=signed&latent=5&pole=-1", "run=sick&latent=9&pole=1")):
        tab.set_default_timeout(60_000)
        tab.goto(f"{address}/latent?{where}")
        tab.get_by_label("latent", exact=True).wait_for()
        settle(tab)
    yield found
    window.close()


@contextmanager
def only_in(tabs: list[Any], acting: int) -> Iterator[Any]:
    """Act in one tab: the other shows what it showed, also when the server draws it anew."""
    tab, other = tabs[acting], tabs[1 - acting]
    settle(other)
    mine, before = visible(tab), visible(other)
    yield tab
    for _ in range(100):  # on a busy machine a click takes a while to reach the server
        if visible(tab) != mine:
            break
        tab.wait_for_timeout(100)
    settle(tab)
    assert visible(tab) != mine, "nothing happened, so nothing was tested"
    assert visible(other) == before
    redraw(other)
    assert visible(other) == before


def enter(tab: Any, field: str, text: str) -> None:
    tab.get_by_label(field, exact=True).fill(text)
    tab.keyboard.press("Enter")


def turn_to(tabs: list[Any], page: str, sign: str) -> None:
    """Go to a page by the menu, which keeps the session, in both tabs."""
    for tab in tabs:
        tab.get_by_role("link", name=page, exact=True).click()
        tab.get_by_text(sign).first.wait_for()
        settle(tab)


@pytest.mark.minutes  # tests/app/test_pages.py asks the same of two sessions without a browser
def test_latents_filters_and_saes_of_two_tabs_are_their_own(tabs: list[Any]) -> None:
    assert [tab.locator("h1").inner_text()[:9] for tab in tabs] == ["Latent #5", "Latent #9"]
    for acting, latent in ((0, "6"), (1, "11")):
        with only_in(tabs, acting) as tab:
            enter(tab, "latent", latent)
    turn_to(tabs, "Features", "similar meaning")
    for acting, word in ((0, "river"), (1, "mill")):
        with only_in(tabs, acting) as tab:
            enter(tab, "Search", word)
    with only_in(tabs, 1) as tab:
        tab.get_by_role("radio", name="dense", exact=True).click()
    turn_to(tabs, "Latent", "Closest directions")
    assert [tab.locator("h1").inner_text()[:10] for tab in tabs] == ["Latent #6 ", "Latent #11"]
    with only_in(tabs, 0) as tab:
        tab.get_by_role("combobox", name="SAE").click()
        tab.get_by_role("option", name="sick").click()
    assert "run=sick&latent=6" in tabs[0].url and "run=sick&latent=11" in tabs[1].url


@pytest.mark.minutes
def test_steering_drafts_of_two_tabs_are_their_own(tabs: list[Any]) -> None:
    turn_to(tabs, "Steering", "What the model says")
    for acting, latent in ((0, "7"), (1, "12"), (0, "8")):
        with only_in(tabs, acting) as tab:
            tab.get_by_label("latent", exact=True).fill(latent)
            tab.get_by_role("button", name="Add", exact=True).click()
    with only_in(tabs, 0) as tab:
        tab.get_by_role("slider").first.press("ArrowLeft")
    with only_in(tabs, 1) as tab:
        tab.get_by_label("Prompt", exact=True).fill("old bridges near")
    with only_in(tabs, 0) as tab:
        tab.get_by_role("button", name="Remove").first.click()
    with only_in(tabs, 1) as tab:
        tab.get_by_role("button", name="Generate").click()
        tab.get_by_text("random control", exact=True).wait_for()
    assert [tab.locator(".sl-strip").count() for tab in tabs] == [0, 5]
