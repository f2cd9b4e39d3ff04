"""The structure of the package: imports point down, no circles, one gateway per heavy dependency, readable sizes."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "saelab"

# From the bottom up: a module may import its own layer and those below it.
LAYERS = [
    {"_version", "copies", "devices", "errors", "files", "layout", "shipped", "stores", "vocabulary"},
    {"kernels"},
    {"sparse"},
    {"sae"},
    {"losses", "metrics", "lm", "data"},
    {"harvesting", "distributed"},
    {"training"},
    {"interop"},
    {"evaluation", "features"},
    {"runs"},
    {"steering", "sweep"},
    {"attribution", "comparison", "prompt", "reproduce", "serving", "workspace"},
    {"viz"},
    {"bench", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
GATEWAYS = {
    "transformer_lens": {"lm", "harvesting"},
    "transformers": {"lm", "bench"},
    "triton": {"kernels"},
    "numba": {"kernels"},
    "plotly": {"viz"},
    "streamlit": set(),
    "datasets": {"data"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
}
# Pairs on one layer that must not know each other.
STRANGERS = {("lm", "sae"), ("data", "sae"), ("lm", "data"), ("data", "lm")}
# Loading one of these takes as long as PyTorch, which few commands need it for: functions import them.
LATE = ("sklearn", "scipy.optimize", "scipy.stats", "torch.distributed.tensor", "transformers", "transformer_lens")
MAX_FILE, MAX_FUNCTION, MAX_SAME_PREFIX = 400, 50, 3


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    return {name_of(path, package): path for path in sorted(package.rglob("*.py"))}


def name_of(path: Path, package: Path) -> str:
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, package: Path, at_once: bool = False) -> Iterator[str]:
    """The dotted names that a file imports, relative imports resolved: wherever in the file they stand, or those that
    importing the file imports ``at_once``."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*parts[: len(parts) - node.level], *filter(None, [node.module])]) if node.level else None
            yield from (f"{base or node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """The folder or module directly below the package that a dotted name belongs to; empty for the package itself."""
    return [*name.split("."), ""][1]


def violations(package: Path) -> list[str]:
    """Imports that point up, to strangers, or to and from rooms that ``LAYERS`` does not know."""
    found = []
    rooms = {room(name) for name in modules(package)} - {""}
    for name, path in modules(package).items():
        own = room(name)
        if own == "":
            continue  # the package's own file names what it exports
        if own not in LEVEL:
            found.append(f"{name}: the room {own!r} has no layer")
            continue
        for target in imported(path, package):
            other = room(target)
            if not target.startswith(f"{package.name}.") or other not in rooms:
                continue
            if LEVEL.get(other, len(LAYERS)) > LEVEL[own]:
                found.append(f"{name} imports {target}, which lies above it")
            if (own, other) in STRANGERS or (own == "kernels" and other != "kernels"):
                found.append(f"{name} must not know {target}")
    return found


def circle(package: Path) -> list[str] | None:
    """The modules of an import circle, if there is one; imports inside functions count."""
    found = modules(package)
    graph = {}
    for name, path in found.items():
        targets = {t if t in found else t.rpartition(".")[0] for t in imported(path, package)}
        graph[name] = {t for t in targets if t in found and t != name}
    graph[package.name] = set()  # names its exports lazily
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def same_prefix(names: Iterable[str]) -> list[str]:
    """Prefixes (up to the first underscore) that more than ``MAX_SAME_PREFIX`` files of one folder share."""
    counts = Counter(name.split("_")[0] for name in names if "_" in name.strip("_"))
    return [prefix for prefix, count in counts.items() if count > MAX_SAME_PREFIX]


def long_functions(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if length > MAX_FUNCTION:
                found.append(f"{path.name}:{node.name} has {length} lines")
    return found


FILES = list(modules(PACKAGE).values())


def test_imports_point_down() -> None:
    assert violations(PACKAGE) == []


def test_commands_start_without_what_takes_long_to_import() -> None:
    late = tuple(f"{name}." for name in LATE)
    for name, path in modules(PACKAGE).items():
        found = [target for target in imported(path, PACKAGE, at_once=True) if f"{target}.".startswith(late)]
        assert not found or room(name) == "bench", f"{name} imports {found} before it needs them"


def test_there_is_no_import_circle() -> None:
    assert circle(PACKAGE) is None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_dependencies_have_one_gateway(path: Path) -> None:
    own = room(name_of(path, PACKAGE))
    for name in imported(path, PACKAGE):
        allowed = GATEWAYS.get(name.split(".")[0])
        assert allowed is None or own in allowed, f"{name} is imported by {path.name}, not by {allowed}"


def without_encoding(path: Path) -> Iterator[str]:
    """Calls that read or write text in the encoding of the machine, which is UTF-8 on some only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = getattr(getattr(function, "value", None), "id", "")
        modes = [a.value for a in [*node.args, *(w.value for w in node.keywords)] if isinstance(a, ast.Constant)]
        text = not any(isinstance(mode, str) and "b" in mode for mode in modes)
        if name in {"read_text", "write_text"} and owner != "loaders" and text:
            yield f"{path.name}:{node.lineno}"
        if name == "open" and text and owner[:1].islower() | (not owner) and owner != "os":
            mode = next((mode for mode in modes if isinstance(mode, str)), "r")
            if set(mode) <= set("rwxat+") or not modes:
                yield f"{path.name}:{node.lineno}"


def test_text_is_utf_8_on_every_machine() -> None:
    files = [*FILES, *sorted((ROOT / "app").rglob("*.py")), ROOT / "docs" / "generate.py"]
    found = [place for path in files for place in without_encoding(path)]
    assert found == []


def test_files_and_functions_stay_readable() -> None:
    files = [*FILES, *sorted((ROOT / "app").rglob("*.py"))]
    assert [path.name for path in files if path.read_text().count("\n") > MAX_FILE] == []
    assert [found for path in files for found in long_functions(path)] == []


@pytest.mark.parametrize("top", ["saelab", "app", "tests"])
def test_folders_stand_where_prefixes_would(top: str) -> None:
    folders: dict[Path, list[str]] = {}
    for path in (ROOT / top).rglob("*.py"):
        folders.setdefault(path.parent, []).append(path.stem.removeprefix("test_"))
    assert {str(folder.name): same_prefix(names) for folder, names in folders.items() if same_prefix(names)} == {}


def test_tests_mirror_the_package() -> None:
    """Every folder of tests is a room of the package, or named here for what it tests across rooms."""
    across = {"app", "docs", "hardening", "zoo"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders - across <= set(LEVEL)


def small_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "saelab"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_the_rules_find_what_they_forbid(tmp_path: Path) -> None:
    """Each rule sees an offence, also one that hides behind a relative import or inside a function."""
    up = {"__init__.py": "", "sae/__init__.py": "", "sae/a.py": "def f():\n    from ..training import loop\n"}
    package = small_package(tmp_path / "up", up | {"training/__init__.py": "", "training/loop.py": ""})
    assert violations(package) == ["saelab.sae.a imports saelab.training.loop, which lies above it"]
    unknown = small_package(
        tmp_path / "unknown", {"__init__.py": "", "attic.py": "", "sae.py": "from . import attic\n"}
    )
    assert len(violations(unknown)) == 2
    ring = {
        "__init__.py": "",
        "sae/__init__.py": "",
        "sae/a.py": "from .b import x\n",
        "sae/b.py": "import saelab.sae.a\n",
    }
    assert set(circle(small_package(tmp_path / "ring", ring)) or ()) == {"saelab.sae.a", "saelab.sae.b"}
    assert same_prefix(["steer", "steer_a", "steer_b", "steer_c", "steer_d"]) == ["steer"]


# What stands at the top of the repository; a new file belongs into one of these folders.
FOLDERS = {"saelab", "app", "notebooks", "tests", "checkpoints", "docs", ".ci", ".github"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_the_top_of_the_repository_keeps_its_shape() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    assert folders == FOLDERS
