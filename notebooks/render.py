"""Run the notebooks at full size, and write them with what they print and draw into docs/tutorials.

``python notebooks/render.py [01 03 ...]`` renders all, or those whose names begin so. It needs the extras ``notebooks``
and ``docs`` and a Chromium that draws the figures, and takes an hour on two cores. The committed notebooks stay without outputs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "tutorials"


def render(path: Path) -> None:
    """Write ``docs/tutorials/NAME.md`` and its figures."""
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        # Progress bars and warnings of other packages.
        cell.get("outputs", [])[:] = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
    page, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem})
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob(f"{path.stem}_*.png"):
        old.unlink()
    for name, content in resources["outputs"].items():
        (PAGES / name).write_bytes(content)
    (PAGES / f"{path.stem}.md").write_text(page, encoding="utf-8")


def main(beginnings: tuple[str, ...]) -> None:
    os.environ["PLOTLY_RENDERER"] = "png"
    os.environ.pop("SAELAB_NOTEBOOK_QUICK", None)
    for path in sorted(HERE.glob("*.ipynb")):
        if not beginnings or path.name.startswith(beginnings):
            print(path.name, flush=True)  # noqa: T201
            render(path)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
