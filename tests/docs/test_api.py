"""The Python interface is documented: every exported name, every reference in a docstring, and the built pages."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from saelab.features import schema

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402  docs/generate.py

MODULES = generate.public_modules()
ROLE = re.compile(r":(?:class|func|mod|meth|data|attr):`~?([^`]+)`")


def exported() -> Iterator[tuple[str, Any]]:
    """Every exported function and class once, by its qualified name."""
    seen: set[int] = set()
    for module in MODULES:
        for name in generate.exports(module):
            value = getattr(importlib.import_module(module), name)
            if (inspect.isfunction(value) or inspect.isclass(value)) and id(value) not in seen:
                seen.add(id(value))
                yield f"{value.__module__}.{value.__qualname__}", value


EXPORTED = dict(exported())


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public functions that a class defines itself."""
    for name, member in vars(cls).items():
        if isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        if isinstance(member, property):
            member = member.fget
        if isinstance(member, cached_property):
            member = member.func
        if inspect.isfunction(member) and member.__name__ == name and not name.startswith("_"):
            yield name, member


def test_there_is_something_to_check() -> None:
    assert len(EXPORTED) > 120
    assert {"saelab.steering.attachment.attach", "saelab.sae.base.SAE"} <= set(EXPORTED)


def undocumented(name: str, value: Any) -> list[str]:
    doc = (value.__doc__ or "").strip()
    # A dataclass without a docstring gets its signature for one.
    found = [name] if not doc or doc.startswith(f"{value.__name__}(") else []
    if inspect.isclass(value):
        found += [f"{name}.{member}" for member, _ in members(value) if not inspect.getdoc(getattr(value, member))]
    return found


def test_every_exported_name_is_documented() -> None:
    assert [bare for name, value in EXPORTED.items() for bare in undocumented(name, value)] == []


def shapeless(value: Any) -> list[str]:
    """Parameters that are tensors of no stated shape: neither annotated nor ``[n, d_in]`` in words.

    The words may stand in the function's docstring or, once for many functions, in its module's.
    """
    words = (value.__doc__ or "") + (sys.modules[value.__module__].__doc__ or "")
    if not inspect.isfunction(value) or "[" in words:
        return []
    parameters = inspect.signature(value).parameters.values()
    return [p.name for p in parameters if re.search(r"\bTensor\b(?!,)", str(p.annotation))]


def test_tensors_have_shapes() -> None:
    assert [f"{name}: {bare}" for name, value in EXPORTED.items() for bare in shapeless(value)] == []


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "saelab").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield module, path.read_text()


def test_references_in_docstrings_lead_somewhere() -> None:
    checked = 0
    for module, text in sources():
        tree = ast.parse(text)
        local = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        local |= {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for target in ROLE.findall(text):
            checked += 1
            assert target.split(".")[0] in local or resolves(target), f"{module} refers to {target}, which is not there"
    assert checked > 30


def test_names_of_the_migration_page_exist() -> None:
    """The right column of its tables of Python names is of this version."""
    table = (ROOT / "docs" / "migration.md").read_text().partition("## Python names that moved")[2]
    right = "\n".join(re.findall(r"^\|.*\|(.*)\|$", table, flags=re.M))
    names = set(re.findall(r"`(saelab\.[\w.]+)`", right))
    assert len(names) > 30
    assert [name for name in sorted(names) if not resolves(name)] == []


def resolves(target: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = target.split(".")
    if parts[0] != "saelab":
        return False
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return False


@pytest.mark.slow
@pytest.mark.minutes  # `make docs` builds it too, with the same options
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs the docs extra")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "_generated" / "reference" / "saelab.steering.html").read_text()
    assert "calibrate" in page and ":class:" not in page
    assert len(list(tmp_path.rglob("*.html"))) > len(MODULES)
    columns = (tmp_path / "feature-index.html").read_text()
    assert "partner_jaccard" in columns and "position of the focus token in the window" in columns


@pytest.mark.parametrize("table", [schema.FEATURE_COLUMNS, schema.EXAMPLE_COLUMNS], ids=["features", "examples"])
def test_every_column_of_the_index_is_described(table: dict[str, tuple[Any, str]]) -> None:
    assert [name for name, (_, text) in table.items() if len(text.split()) < 2] == []
    page = generate.columns(table)
    assert all(f"| `{name}` | {kind} | {text} |" in page for name, (kind, text) in table.items())


def test_every_public_object_has_one_entry_in_the_reference() -> None:
    pages = "\n".join(generate.reference(MODULES).values())
    entries = re.findall(r"^\.\. auto(?:class|exception|function):: (\S+)$", pages, flags=re.M)
    objects = [id(resolved(entry)) for entry in entries]
    assert len(objects) == len(set(objects))
    assert {id(value) for value in EXPORTED.values()} <= set(objects)


def resolved(name: str) -> Any:
    module, _, member = name.rpartition(".")
    return getattr(importlib.import_module(module), member)
