"""Run the notebooks, and write each with what it prints and draws as a page of the site into ``docs/tutorials``.

``make tutorials`` renders all. ``python notebooks/render.py [01 03 ...] [--quick]`` renders those whose names begin so,
``--quick`` at the small size of the tests. The figures need a Chromium on PATH. The notebooks stay without outputs.
"""

from __future__ import annotations

import base64
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

import saelab

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "tutorials"
FIRST = "from plotly.io import renderers; renderers['png'].width, renderers['png'].scale = 720, 1.5"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def execute(path: Path) -> NotebookNode:
    """The notebook with outputs, figures as PNG."""
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST))
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(HERE)}}).execute()
    del notebook.cells[0]
    return notebook


def page(notebook: NotebookNode, stem: str, small: bool = False) -> tuple[str, dict[str, bytes]]:
    """The Markdown of an executed notebook, and its figures by file name."""
    title, _, opening = notebook.cells[0].source.partition("\n")
    size = ", at the small size of the tests: what it trains is too small to mean anything" if small else ""
    about = f"*[This notebook](../../notebooks/{stem}.ipynb), run with saelab {saelab.__version__}{size}.*"
    parts = [title, about, opening.strip()]
    figures: dict[str, bytes] = {}
    for cell in notebook.cells[1:]:
        parts.append(fenced(cell.source, "python") if cell.cell_type == "code" else cell.source)
        for kind, content in outputs(cell):
            if kind == "figure":
                name = f"{stem}_{len(figures) + 1}.png"
                figures[name] = base64.b64decode(content)
                content = f"![What the code above draws]({name})"
            parts.append(content)
    return "\n\n".join(part for part in parts if part) + "\n", figures


def outputs(cell: NotebookNode) -> Iterator[tuple[str, str]]:
    """What a cell printed and returned, as ``(kind, Markdown or base64)``; progress bars and warnings are left out."""
    printed = ""
    for out in [*cell.get("outputs", []), None]:
        data = {} if out is None else out.get("data", {})
        rich = "image/png" in data or "text/html" in data
        if (rich or out is None) and printed.strip():
            yield "text", fenced(ESCAPES.sub("", printed), "text")
            printed = ""
        if "image/png" in data:
            yield "figure", data["image/png"]
        elif "text/html" in data:
            yield "html", html(data["text/html"])
        elif data.get("text/plain", "").startswith("Figure("):
            raise RuntimeError("a figure was not drawn; is a Chromium on PATH, and kaleido installed?")
        elif "text/plain" in data:
            printed += data["text/plain"] + "\n"
        elif out is not None and out.output_type == "stream" and out.name == "stdout":
            printed += out.text


def fenced(text: str, language: str) -> str:
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def html(text: str) -> str:
    """HTML that Markdown leaves alone: without blank lines, which would end it, and without styles, which the site has."""
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = text.replace('<table border="1" class="dataframe">', '<table class="docutils">')
    text = re.sub(r"\n\s*(?=<t[hd]|</tr>)", "", text)  # a row of a table is a line
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    # The fragments of saelab.viz have colours for a white page, whatever the theme of the site.
    white = ' style="background: white; padding: 0.5rem"' if "sl-" in text else ""
    return "\n".join([f'<div class="table-wrapper"{white}>', *lines, "</div>"])


def render(path: Path, small: bool) -> None:
    """Write ``docs/tutorials/NAME.md`` and its figures."""
    started = time.monotonic()
    text, figures = page(execute(path), path.stem, small)
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob(f"{path.stem}_*.png"):
        old.unlink()
    for name, content in figures.items():
        (PAGES / name).write_bytes(content)
    (PAGES / f"{path.stem}.md").write_text(text, encoding="utf-8")
    print(f"{path.stem}: {time.monotonic() - started:.0f} s", flush=True)  # noqa: T201


def main(arguments: list[str]) -> None:
    small = "--quick" in arguments
    beginnings = tuple(argument for argument in arguments if argument != "--quick")
    os.environ["PLOTLY_RENDERER"] = "png"
    os.environ["SAELAB_NOTEBOOK_QUICK"] = "1" if small else "0"
    if small:  # its caches are not those of a run at full size
        os.environ.setdefault("SAELAB_NOTEBOOK_FOLDER", "../demo/notebooks-small")
    for path in sorted(HERE.glob("*.ipynb")):
        if not beginnings or path.name.startswith(beginnings):
            render(path, small)


if __name__ == "__main__":
    main(sys.argv[1:])
