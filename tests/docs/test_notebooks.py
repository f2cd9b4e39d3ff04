"""The notebooks run from top to bottom on a small setting, and are committed without outputs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 180  # seconds for a notebook, which shares the cores with other tests


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all notebooks, so that the cache is harvested once."""
    return tmp_path_factory.mktemp("notebooks")


def test_there_are_ten() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(1, 11)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_prose_stands_beside_code(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and notebook.cells[0].source.startswith("# ")
    assert kinds.count("markdown") >= kinds.count("code") / 2
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert len(cell.source.splitlines()) <= 22, "logic belongs in the library"


@pytest.fixture(scope="module")
def kernel(work: Path) -> Iterator[AsyncKernelManager]:
    """One kernel for all notebooks, since importing takes longer than most of them; each starts with no variables."""
    with pytest.MonkeyPatch.context() as patch:
        root = str(FOLDER.parent)
        patch.setenv("SAELAB_NOTEBOOK_QUICK", "1")
        patch.setenv("SAELAB_NOTEBOOK_FOLDER", str(work))
        patch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        manager = AsyncKernelManager(client_class="jupyter_client.asynchronous.AsyncKernelClient")
        yield manager
        run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, kernel: AsyncKernelManager) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    end = time.monotonic() + LIMIT
    # Each cell may take what the ones before it have left.
    options = {"timeout_func": lambda cell: max(1, int(end - time.monotonic()))}
    client = NotebookClient(notebook, km=kernel, resources={"metadata": {"path": str(FOLDER)}}, **options)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()  # nbclient leaves the sockets open where the kernel goes on
    assert time.monotonic() < end
