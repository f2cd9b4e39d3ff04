"""Every page's text, measured in a real browser against what lies behind it, in both themes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from seen import settle

pytestmark = pytest.mark.browser

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
    // The number of a slider stands above its thumb, not on it.
    const apart = element.closest('[data-testid=stSliderThumbValue]');
    for (let e = apart ? null : element; e; e = e.parentElement) {
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
PAGES = ("", "training", "compare", "features", "latent", "health", "prompt", "attribution", "steer_eval", "steering")


def faint(page: Any) -> list[Any]:
    """What stays below level AA once the page is drawn: styles may arrive a moment after the text."""
    found = page.evaluate(FAINT)
    for _ in range(20):
        if not found:
            break
        page.wait_for_timeout(250)
        found = page.evaluate(FAINT)
    return found


GROUNDS = {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 18, 22)"}


FEW = ("", "latent", "steering")  # with tables, windows of text, and controls that are switched off


# The palettes of both are measured without a browser in test_viz.py.
@pytest.mark.parametrize(
    ("theme", "pages"),
    [("light", FEW)] + [pytest.param(theme, PAGES, marks=pytest.mark.minutes) for theme in ("light", "dark")],
)
def test_all_text_has_the_contrast_of_level_aa(page: Any, address: str, theme: str, pages: tuple[str, ...]) -> None:
    ground = GROUNDS[theme]
    page.emulate_media(color_scheme=theme)
    for name in pages:
        page.goto(f"{address}/{name}?run=sick")
        page.locator("h1").first.wait_for()
        settle(page)
        assert page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor") == ground
        assert faint(page) == [], (name, theme)
        if name == "steering":
            disabled_is_in_sight(page, ground)
    # The test can see: a title half as strong is found.
    page.evaluate("document.querySelector('h1').style.opacity = 0.3")
    assert [found[0] for found in page.evaluate(FAINT)] == ["Steering"]


def disabled_is_in_sight(page: Any, ground: str) -> None:
    """A button that cannot be pressed yet may be faint, but is seen."""
    button = page.get_by_role("button", name="Generate")
    assert button.is_disabled()
    text = button.evaluate("e => getComputedStyle(e.querySelector('p')).color")
    ink, paper = (list(map(float, re.findall(r"[\d.]+", colour)))[:3] for colour in (text, ground))
    assert sum(abs(a - b) for a, b in zip(ink, paper)) > 90, text
