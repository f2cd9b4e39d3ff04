"""Take the pictures of the app in docs/images again: `python docs/pictures.py [NAME ...]`.

It opens a copy of checkpoints/ in Chromium, with SmolLM2, and takes minutes. Pictures are 1,440 pixels wide.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "app"))

from seen import CHROMIUM, SWITCHES, settle  # noqa: E402
from users import serve  # noqa: E402

RUN, LATENT = "topk_16384", 10976  # fires on the names of God in the King James Bible
PAGES = {  # picture -> address, height
    "overview": (f"?run={RUN}", 1400),
    "features": (f"features?run={RUN}&q=gods", 940),
    "health": (f"health?run={RUN}", 760),
    "latent": (f"latent?run={RUN}&latent={LATENT}", 940),
    "steering": (f"steering?run={RUN}&steering_prompt=The+weather+today", 1500),
}


def take(tab: Any, base: str, name: str) -> None:
    """One picture, once nothing on the page is still being drawn."""
    address, height = PAGES[name]
    tab.set_viewport_size({"width": 1440, "height": height})
    tab.goto(f"{base}/{address}")
    tab.wait_for_selector("h1")
    settle(tab)
    if name == "steering":
        tab.get_by_label("latent", exact=True).fill(str(LATENT))
        tab.get_by_role("button", name="Add").click()
        tab.wait_for_selector("text=found by calibration")
        settle(tab)
        tab.get_by_role("button", name="Generate").click()
        tab.wait_for_selector("text=Marked: tokens")
        settle(tab)
    # What is below the edge is drawn when it comes into sight, and the place of what is missing is grey until then.
    tab.wait_for_selector("[data-testid=stSkeleton]", state="detached")
    tab.mouse.move(1400, 5)
    tab.wait_for_timeout(1500)
    tab.screenshot(path=ROOT / "docs" / "images" / f"{name}.png")


def main(names: list[str]) -> None:
    """The pictures that are named, or all."""
    with tempfile.TemporaryDirectory() as folder:
        # A copy: opening pages must leave nothing in what is committed.
        shown = Path(folder) / "checkpoints"
        shutil.copytree(ROOT / "checkpoints", shown)
        with serve(shown) as (port, _), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
            tab = browser.new_page()
            tab.set_default_timeout(180_000)
            for name in names or list(PAGES):
                take(tab, f"http://127.0.0.1:{port}", name)
            browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
