"""The tutorials of the site are the notebooks: the same prose and code in the same order, and every figure is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbformat", reason="needs the notebooks extra")
import nbformat

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))
import render  # noqa: E402  notebooks/render.py

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 4_000_000  # bytes of all pages and figures


def expected(path: Path) -> tuple[str, list[str]]:
    """The title of a notebook, and its text and code in the form that a page gives them."""
    first, *cells = nbformat.read(path, as_version=4).cells
    title, _, opening = first.source.partition("\n")
    parts = [render.fenced(cell.source, "python") if cell.cell_type == "code" else cell.source for cell in cells]
    return title, [part for part in [opening.strip(), *parts] if part]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_has_the_prose_and_code_of_its_notebook(path: Path) -> None:
    page = (render.PAGES / f"{path.stem}.md").read_text(encoding="utf-8")
    title, parts = expected(path)
    assert page.startswith(f"{title}\n"), f"render {path.name} again: make tutorials"
    at = 0
    for part in parts:
        at = page.find(f"\n{part}\n", at)
        assert at >= 0, (
            f"the page lacks this; render {path.name} again (python notebooks/render.py {path.stem}):\n{part}"
        )
        at += len(part)
    assert page.count("```python\n") == sum(part.startswith("```python\n") for part in parts)


def test_every_notebook_is_a_page_of_the_site() -> None:
    stems = [path.stem for path in NOTEBOOKS]
    assert sorted(page.stem for page in render.PAGES.glob("*.md")) == stems
    index = (ROOT / "docs" / "index.md").read_text()
    assert re.findall(r"^tutorials/(\w+)$", index, flags=re.M) == stems


def test_figures_are_there_and_small() -> None:
    named = {name for page in render.PAGES.glob("*.md") for name in re.findall(r"\]\((\w+\.png)\)", page.read_text())}
    assert named == {figure.name for figure in render.PAGES.glob("*.png")}
    assert sum(file.stat().st_size for file in render.PAGES.iterdir()) < LARGEST


def test_pages_name_no_path_of_the_machine_that_rendered_them() -> None:
    for page in render.PAGES.glob("*.md"):
        assert not re.search(r"(?<![\w.])/(?:tmp|home|root|Users|usr|var)/", page.read_text()), page.name


def test_outputs_become_markdown() -> None:
    """Text in one block, figures as files, HTML in one piece, and nothing of the error stream."""
    code = nbformat.v4.new_code_cell("show()")
    code.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a warning\n"),
        nbformat.v4.new_output("stream", name="stdout", text="\x1b[31mFVU\x1b[0m 0.1\n"),
        nbformat.v4.new_output("display_data", {"image/png": "AAAA", "text/plain": "Figure()"}),
        nbformat.v4.new_output(
            "execute_result", {"text/html": "<style scoped>\n</style>\n\n<b>x</b>\n\n<i>y</i>", "text/plain": "x"}
        ),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\nOpening."), code])
    text, figures = render.page(notebook, "name")
    assert figures == {"name_1.png": b"\x00\x00\x00"}
    assert "](name_1.png)" in text and "```text\nFVU 0.1\n```" in text
    assert '<div class="table-wrapper">\n<b>x</b>\n<i>y</i>\n</div>' in text
    assert "a warning" not in text and "Figure()" not in text


def test_a_figure_that_was_not_drawn_is_no_text() -> None:
    code = nbformat.v4.new_code_cell("chart()")
    code.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "Figure({})"})]
    with pytest.raises(RuntimeError, match="Chromium"):
        list(render.outputs(code))
