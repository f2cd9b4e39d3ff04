"""A page as somebody in front of it has it: the browser, when it is at rest, and what is on it."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SWITCHES = (  # noqa: SIM905
    "--headless --no-sandbox --disable-gpu --disable-gpu-rasterization --disable-gpu-compositing --disable-quic "
    "--no-first-run --disable-background-networking --disable-component-update --disable-sync"
).split()


# Has the script rested at enough looks in a row? More of them until it was seen to run: what was done takes a moment to
# reach the server. A page that is busy drawing is not looked at.
RESTS = """settling => {
  const rest = window.resting?.settling === settling ? window.resting : { settling, looks: 0, ran: false };
  window.resting = rest;
  const running = document.querySelector('.stApp')?.dataset.testScriptState !== 'notRunning';
  rest.looks = running ? 0 : rest.looks + 1;
  rest.ran ||= running;
  return rest.looks > (rest.ran ? 4 : 7);
}"""
settlings = itertools.count()


def settle(page: Any) -> None:
    """Wait until the app has drawn what was asked for."""
    page.wait_for_function(RESTS, arg=next(settlings), polling=50)


def visible(page: Any) -> list[str]:
    """All that a tab shows: its address, its text line by line, and what stands in its fields."""
    leave_field(page)
    fields = page.evaluate("[...document.querySelectorAll('input, textarea')].map(e => e.value)")
    return [page.url, *page.locator(".stApp").inner_text().splitlines(), *fields]


def redraw(page: Any) -> None:
    """Have the app draw a tab again, from what the server remembers of it."""
    leave_field(page)
    page.keyboard.press("r")
    settle(page)


def leave_field(page: Any) -> None:
    """Take the cursor out of a field, and with it the hint on how to submit."""
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(200)
