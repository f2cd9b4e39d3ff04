"""The rules of the house: imports point down, heavy dependencies have one gateway, files stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "saelab"

# From the bottom up: a module may import its own layer and those below it.
LAYERS = [
    {"_version", "errors", "shipped"},
    {"kernels"},
    {"sparse"},
    {"sae"},
    {"losses", "metrics", "lm", "data"},
    {"train", "distributed", "checkpoint"},
    {"reproduce", "interop", "features", "steer", "evaluate", "sweep", "workspace"},
    {"viz", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
GATEWAYS = {
    "transformer_lens": {"lm"},
    "transformers": {"lm"},
    "triton": {"kernels"},
    "numba": {"kernels"},
    "plotly": {"viz"},
    "streamlit": set(),
    "datasets": {"data"},
}
MAX_FILE, MAX_FUNCTION = 250, 50
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The layer name a file belongs to: its folder or module directly below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    if room(path) == "__init__":
        return
    own = LEVEL[room(path)]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "saelab" or len(parts) < 2:
            continue
        assert LEVEL.get(parts[1], 0) <= own, f"{path.name} is on layer {own} and imports {name}"
        if room(path) in {"lm", "data"}:
            assert parts[1] != "sae", f"{path.name} must not know SAEs"
        if room(path) == "kernels":
            assert parts[1] == "kernels", f"{path.name} must import nothing of ours, found {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_dependencies_have_one_gateway(path: Path) -> None:
    for name in imported(path):
        allowed = GATEWAYS.get(name.split(".")[0])
        assert allowed is None or room(path) in allowed, f"{name} is imported by {path.name}, not by {allowed}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE, f"{path.name} has outgrown its room: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= MAX_FUNCTION, f"{path.name}:{node.name} has {length} lines"
