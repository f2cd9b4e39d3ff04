"""Figures with a token at each column, on a narrow and on a wide page: their labels have room and are inside."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from seen import settle

pytestmark = pytest.mark.browser

TEXT = "the river runs past a mill and old bridges while rain falls on green hills near grey towns " * 3
LABELS = """() => [...document.querySelectorAll('.js-plotly-plot')].slice(0, 1).map(plot => {
  const inside = plot.getBoundingClientRect();
  const boxes = axis => [...plot.querySelectorAll(`.${axis}tick text`)].map(text => text.getBoundingClientRect());
  return {
    columns: boxes('x').map(box => box.x + box.width / 2),
    cut: [...boxes('x'), ...boxes('y')].filter(
      box => box.left < inside.left - 1 || box.bottom > inside.bottom + 1 || box.right > inside.right + 1).length,
    map: plot.querySelector('.nsewdrag').getBoundingClientRect().width / inside.width,
  };
})[0]"""


@pytest.mark.parametrize("width", [800, pytest.param(1280, marks=pytest.mark.minutes)])
@pytest.mark.parametrize(("path", "asked"), [("prompt", "Read"), ("attribution", "Explain")])
def test_labels_of_tokens_have_room(page: Any, address: str, width: int, path: str, asked: str) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    page.goto(f"{address}/{path}?run=sick&{path}_{'text' if path == 'prompt' else 'prompt'}={quote(TEXT)}")
    page.get_by_role("button", name=asked, exact=True).click()
    settle(page)
    page.locator(".js-plotly-plot .xtick text").first.wait_for(state="attached")
    found = page.evaluate(LABELS)
    assert len(found["columns"]) > 8 and not found["cut"], found
    gaps = [right - left for left, right in zip(found["columns"], found["columns"][1:])]
    assert min(gaps) > 11, "as high as a line: labels that stand upright do not touch"
    assert found["map"] > 0.5, "most of the width is the figure's"
