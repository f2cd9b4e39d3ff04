"""Reading mode in a real browser: search, walk with the keys, label, gather, and a link that loses nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from seen import settle

from saelab.workspace.collections import read_collections
from saelab.workspace.notes import read_notes

pytestmark = pytest.mark.browser


def shown(page: Any) -> str:
    """The heading of the latent beside the table."""
    return page.locator(".stMain h5").first.inner_text()


def test_results_are_walked_labelled_and_shared(page: Any, address: str, sick_folder: Path) -> None:
    page.goto(f"{address}/features?run=sick")
    page.get_by_label("Search", exact=True).fill("river")
    page.keyboard.press("Enter")
    settle(page)
    page.evaluate("document.activeElement.blur()")
    first = shown(page)
    page.keyboard.press("ArrowDown")
    settle(page)
    second = shown(page)
    assert second != first
    asked = parse_qs(urlsplit(page.url).query)
    assert asked["q"] == ["river"] and asked["at"] == ["2"] and asked["run"] == ["sick"]
    page.keyboard.press("b")
    settle(page)
    page.keyboard.press("4")
    settle(page)
    page.keyboard.press("l")
    page.get_by_label(re.compile("Label of #")).fill("a walk by the water")
    page.get_by_role("button", name="Save").click()
    settle(page)
    latent = int(re.search(r"#(\d+)", second)[1])
    assert read_notes(sick_folder / "sick")[latent] == {"label": "a walk by the water", "note": "", "rating": "4"}
    assert [m.latent for m in read_collections(sick_folder)["bookmarks"].members] == [latent]
    settle(page)
    assert "a walk by the water" in shown(page)
    page.reload()
    page.get_by_label("Search", exact=True).wait_for()
    settle(page)
    assert shown(page) == second or "a walk by the water" in shown(page)
    assert page.get_by_label("Search", exact=True).input_value() == "river"
    page.keyboard.press("ArrowUp")
    settle(page)
    page.keyboard.press("o")
    page.get_by_text("Closest directions").wait_for()
    settle(page)
    assert re.search(r"/latent\?.*latent=\d+", page.url)
    gathered(page, address, latent, sick_folder)


def gathered(page: Any, address: str, latent: int, folder: Path) -> None:
    """The bookmarked latent on the Collections page: a note, its counterparts, the bench, and the end of it."""
    page.get_by_role("link", name="Collections").click()
    page.get_by_role("button", name="Steer", exact=True).wait_for()
    settle(page)
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Note", exact=True).fill("near rivers")
    page.get_by_role("button", name="Save the note").click()
    page.get_by_text("near rivers", exact=True).last.wait_for()
    settle(page)
    assert read_collections(folder)["bookmarks"].note == "near rivers"
    page.get_by_text("Compare across SAEs").click()
    page.wait_for_url(re.compile("c_across=true"))
    settle(page)
    assert page.locator(".stDataFrame").count() == 2
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_text("What the model says").wait_for()
    settle(page)
    assert re.search(rf"pick={latent}%3Badd", page.url) and page.get_by_text(re.compile(rf"^#{latent} ")).count()
    page.get_by_role("link", name="Collections").click()
    page.get_by_role("button", name="Edit").click()
    page.get_by_role("button", name="Delete the collection").click()
    page.get_by_text("There is no collection").wait_for()
    settle(page)
    assert read_collections(folder) == {}
