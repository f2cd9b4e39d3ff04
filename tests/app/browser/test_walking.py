"""Walking through the app in a real browser: the address, the way back, rows that open by a click."""

from __future__ import annotations

import re
from typing import Any

import pytest
from seen import settle

pytestmark = pytest.mark.browser


def titled(page: Any, text: str) -> None:
    page.locator("h1", has_text=re.compile(text)).wait_for()
    settle(page)


def search_for_river(page: Any, address: str) -> None:
    page.goto(f"{address}/features?run=signed")
    titled(page, "Features")
    page.get_by_label("Search", exact=True).fill("river")
    page.keyboard.press("Enter")
    settle(page)


def test_one_press_of_back_undoes_one_step(page: Any, address: str) -> None:
    search_for_river(page, address)
    page.locator(".st-key-features_preview_open button").click()
    titled(page, "Latent #")
    first = page.url
    page.get_by_label("latent", exact=True).fill("9")
    page.keyboard.press("Enter")
    titled(page, "Latent #9 ")
    page.get_by_role("link", name="Health").click()
    titled(page, "Health")
    assert page.url.endswith("/health?run=signed")
    page.get_by_role("link", name="Features", exact=True).click()
    titled(page, "Features")
    assert page.get_by_label("Search", exact=True).input_value() == "river", "the menu leads back to what was asked"
    back = (
        ("Health", "health?run=signed"),
        ("Latent #9 ", "latent=9&pole=1"),
        ("Latent #", first),
        ("Features", "features?q=river&run=signed"),
    )
    for title, url in back:
        page.go_back()
        titled(page, title)
        assert url in page.url


def test_back_from_a_button_finds_the_page_as_it_was_left(page: Any, address: str) -> None:
    search_for_river(page, address)
    for row in ("2", "3"):
        page.locator(".st-key-read_down button").click()
        page.wait_for_url(re.compile(f"at={row}"))
        settle(page)
    left, length = page.url, page.evaluate("history.length")
    page.locator(".st-key-features_preview_open button").click()
    titled(page, "Latent #")
    assert page.evaluate("history.length") == length + 1, "a button is one step, as a link is"
    latent = page.url
    assert re.search(r"/latent\?run=signed&latent=\d+&pole=-?1$", latent)
    page.locator(".st-key-latent_steer button").click()
    titled(page, "Steering")
    for title, url in (("Latent #", latent), ("Features", left)):
        page.go_back()
        titled(page, title)
        assert page.url == url
    assert page.get_by_label("Search", exact=True).input_value() == "river"
    assert page.get_by_label("row", exact=True).input_value() == "3"
    page.go_forward()
    titled(page, "Latent #")
    assert page.url == latent


def test_a_reloaded_page_shows_what_was_set(page: Any, address: str) -> None:
    page.goto(f"{address}/prompt?run=signed")
    titled(page, "Prompt")
    page.get_by_label("Text", exact=True).fill("the river runs past a mill")
    page.get_by_role("button", name="Read").click()
    page.get_by_role("option").nth(5).click()
    page.get_by_role("heading", name=re.compile("Token 5")).wait_for()
    settle(page)
    page.reload()
    page.get_by_role("heading", name=re.compile("Token 5")).wait_for()
    settle(page)
    assert page.get_by_label("Text", exact=True).input_value() == "the river runs past a mill"
    page.get_by_label("Text", exact=True).fill("the river runs past a mill " * 90)
    page.get_by_role("button", name="Read").click()
    page.get_by_text("too long for an address").wait_for()
    settle(page)
    assert len(page.url) < 2000 and "prompt_text" not in page.url
    # What is done with the latents of the Steering page, too.
    page.goto(f"{address}/steering?run=signed&pick=3%3Badd%3B0.5max%3Bgenerated%3Bschedule%3D0%3A1%2C9%3A0")
    titled(page, "Steering")
    slider = page.get_by_role("slider").first
    slider.press("ArrowLeft")
    page.wait_for_url(re.compile("0.499max"))
    settle(page)
    page.reload()
    titled(page, "Steering")
    settle(page)
    assert "0.499max" in page.url
    assert page.get_by_text("weight of generated tokens: 1 at 0, 0 at 9").count() == 1
    page.go_back()
    page.wait_for_url(re.compile("0.5max"))


def test_the_map_opens_a_latent(page: Any, address: str) -> None:
    page.goto(f"{address}/map?run=sick")
    titled(page, "Map")
    make = page.get_by_role("button", name="Make the map")
    make.or_(page.locator(".js-plotly-plot")).first.wait_for()
    if make.count():
        make.click()
    page.locator(".js-plotly-plot").wait_for()
    page.get_by_role("radio", name="density").click()
    page.wait_for_url(re.compile("map_colour=density"))
    settle(page)
    x, y, latent = page.evaluate(POINT)
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_timeout(300)
    page.mouse.click(x, y)
    page.wait_for_url(re.compile(rf"latent=(?:{'|'.join(map(str, latent))})&"))
    titled(page, "Latent #")
    page.go_back()
    titled(page, "Map")


# Where the first point of a chart is drawn, and the latents of all points that lie there.
POINT = """() => {
  const chart = document.querySelector('.js-plotly-plot'), { xaxis, yaxis } = chart._fullLayout, trace = chart.data[0];
  const box = chart.getBoundingClientRect();
  const at = i => [box.x + xaxis._offset + xaxis.d2p(trace.x[i]), box.y + yaxis._offset + yaxis.d2p(trace.y[i])];
  const [x, y] = at(0), near = i => Math.hypot(at(i)[0] - x, at(i)[1] - y) < 8;
  return [x, y, [...trace.customdata].filter((_, i) => near(i))];
}"""


def test_a_new_latent_is_seen_from_its_top(page: Any, address: str) -> None:
    page.set_viewport_size({"width": 1440, "height": 500})
    page.goto(f"{address}/latent?run=signed&latent=5&pole=1")
    titled(page, "Latent #5")
    main = page.locator("[data-testid=stMain]")
    table = page.locator("[class*=st-key-latent_neighbours] .stDataFrame").first
    table.evaluate("e => e.scrollIntoView({ block: 'center' })")
    page.wait_for_timeout(500)
    assert main.evaluate("e => e.scrollTop") > 200
    click_row(page, table, 0)
    page.wait_for_url(re.compile(r"latent=(?!5&)\d+"))
    settle(page)
    assert main.evaluate("e => e.scrollTop") == 0


def click_row(page: Any, table: Any, row: int) -> None:
    """Click into a row's second cell, as a reader would, not on its box."""
    box = table.bounding_box()
    page.mouse.click(box["x"] + min(300, box["width"] / 2), box["y"] + 35 + 35 * row + 17)


def test_a_narrow_window_loses_no_words(page: Any, address: str) -> None:
    page.set_viewport_size({"width": 800, "height": 900})
    for place, title in (("", "Overview"), ("features", "Features"), ("latent", "Latent"), ("compare", "Compare")):
        page.goto(f"{address}/{place}?run=signed")
        titled(page, title)
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), title
        cut = page.evaluate(
            "[...document.querySelectorAll('.stButton button, .stPopover button, [data-testid=stPageLink] a')]"
            ".filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)"
        )
        assert not cut, (title, cut)
        widths = page.evaluate(
            "[...document.querySelectorAll('.stDataFrame, .stPlotlyChart')].map(e => e.getBoundingClientRect().width)"
        )
        assert all(width >= 260 for width in widths if width), (title, widths)


def test_a_row_of_the_overview_is_chosen_by_a_click_and_the_next_by_an_arrow_key(page: Any, address: str) -> None:
    page.goto(f"{address}/?run=sick")
    titled(page, "Overview")
    click_row(page, page.locator(".stDataFrame").first, 1)  # by name: sick, signed
    page.wait_for_url(re.compile("run=signed"))
    settle(page)
    assert page.get_by_text("signed · abs_topk").first.is_visible()
    page.keyboard.press("ArrowUp")
    page.wait_for_url(re.compile("run=sick"))
    settle(page)
    page.keyboard.press("ArrowDown")
    page.wait_for_url(re.compile("run=signed"))


def test_tokens_of_a_text_are_chosen_in_the_text(page: Any, address: str) -> None:
    page.goto(f"{address}/prompt?run=signed")
    titled(page, "Prompt")
    page.get_by_label("Text", exact=True).fill("the river <script>alert(1)</script> runs past\na mill")
    page.get_by_role("button", name="Read").click()
    tokens = page.get_by_role("option")
    tokens.first.wait_for()
    settle(page)
    assert page.get_by_role("listbox", name=re.compile("tokens")).count() == 1
    # The SAE was trained on a cache with rows of all positions, so the first token counts.
    assert tokens.nth(1).get_attribute("aria-selected") == "true", "the second token"
    tokens.nth(3).click()
    page.get_by_role("heading", name=re.compile("Token 3")).wait_for()
    settle(page)
    page.get_by_role("listbox", name=re.compile("tokens")).focus()
    page.keyboard.press("ArrowRight")
    page.get_by_role("heading", name=re.compile("Token 4")).wait_for()
    page.keyboard.press("Home")
    page.get_by_role("heading", name=re.compile("Token 0")).wait_for()
    assert page.locator(".strip script").count() == 0


def test_examples_say_which_token_they_are_about(page: Any, address: str) -> None:
    page.goto(f"{address}/latent?run=signed&latent=3&pole=1")
    titled(page, "Latent #3")
    page.locator(".sl-example").first.wait_for()
    assert page.get_by_role("listitem").count() >= 2
    said = page.get_by_role("listitem").first.text_content()
    assert re.search(r"activation [+-]\d+\.\d\d on the token ‘.+’, in:", said), said
