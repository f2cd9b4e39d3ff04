"""Generate the pages that repeat the code: the Python reference, the commands and the columns of the feature index.

``docs/conf.py`` calls :func:`main` at the start of a build. ``python docs/generate.py FOLDER`` writes them elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import saelab

OUTPUT = Path(__file__).parent / "_generated"
# Modules without an ``__all__`` that users are sent to by name.
NAMED = (
    "saelab.files",
    "saelab.sae.weights",
    "saelab.data.synthetic",
    "saelab.data.text",
    "saelab.errors",
    "saelab.runs.publishing",
    "saelab.kernels.reference.backend",
    "saelab.losses",
    "saelab.sparse",
    "saelab.steering.directions",
    "saelab.steering.vectors",
)
WIDTH = 100  # characters in a line of a command's help


def public_modules() -> list[str]:
    """Packages with an ``__all__``, the variants, and ``NAMED``."""
    variants = {cls.__module__ for cls in saelab.VARIANTS.values()}
    found = [name for name in walk() if name in NAMED or name in variants or exports(name)]
    missing = set(NAMED) - set(found)
    if missing:
        raise SystemExit(f"no such module: {', '.join(sorted(missing))}")
    return found


def walk() -> Iterator[str]:
    """Every module of saelab by name, without the commands: the page of the commands documents those."""
    yield "saelab"
    for module in pkgutil.walk_packages(saelab.__path__, "saelab."):
        if not module.name.startswith(("saelab.cli", "saelab.bench", "saelab.__main__")):
            yield module.name


def exports(name: str) -> list[str]:
    """``__all__`` of a module that runs on this machine; nothing where it has none."""
    if ".triton" in name or ".numba" in name or name.startswith("saelab.bench"):
        return []
    return list(getattr(importlib.import_module(name), "__all__", []))


def reference(names: list[str]) -> dict[str, str]:
    """File name -> page: one page per module, each object documented once, where its package exports it."""
    home: dict[int, str] = {}
    pages = {}
    # The top level repeats the names of the packages, so it comes last and links to them.
    for name in [*(n for n in names if n != "saelab"), "saelab"]:
        module = importlib.import_module(name)
        members = [(member, getattr(module, member)) for member in (exports(name) or own_members(module))]
        lines = [
            f"# {name}",
            "",
            "```{eval-rst}",
            f".. py:module:: {name}",
            f".. automodule:: {name}",
            "   :no-index:",
            "",
        ]
        for member, value in members:
            if isinstance(value, ModuleType) or member.startswith("_"):
                continue
            path = f"{name}.{member}"
            if id(value) in home:
                text = summary(value)
                lines += [f"- :py:obj:`{path} <{home[id(value)]}>`" + (f": {text}" if text else ""), ""]
                continue
            home[id(value)] = path
            lines += directive(path, value)
        pages[f"{name}.md"] = "\n".join([*lines, "```", ""])
    index = ["# Python reference", "", "| module | content |", "|---|---|"]
    index += [f"| [{name}]({name}.md) | {summary(importlib.import_module(name))} |" for name in names]
    index += ["", "```{toctree}", ":hidden:", "", *names, "```", ""]
    return {**pages, "index.md": "\n".join(index)}


def own_members(module: ModuleType) -> list[str]:
    """Public functions and classes that a module without ``__all__`` defines itself, in the order of the source."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def summary(value: Any) -> str:
    """The first sentence or paragraph of a docstring; nothing for plain values."""
    documented = inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)
    paragraph = (inspect.getdoc(value) or "").partition("\n\n")[0] if documented else ""
    return " ".join(paragraph.split()).replace("|", "\\|")


def directive(path: str, value: Any) -> list[str]:
    """The autodoc directive of an object."""
    if inspect.isclass(value):
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
        return [f".. {kind}:: {path}", "   :members:", "   :show-inheritance:", ""]
    if callable(value):
        return [f".. autofunction:: {path}", ""]
    # autodoc would print the docstring of the value's type
    lines = [f".. py:data:: {path}", f"   :type: {type(value).__name__}", ""]
    if isinstance(value, dict):
        lines += [f"   Keys: {', '.join(f'``{key}``' for key in value)}.", ""]
    return lines


def commands() -> str:
    """The page of the commands: the text of each ``--help``."""
    from saelab import cli

    parts = ["# Commands", "", "`saelab COMMAND --help` prints the same texts.", ""]
    parts += ["| command | what it does |", "|---|---|"]
    parts += [f"| [`{name}`](#saelab-{name}) | {text} |" for name, text in cli.COMMANDS.items()]
    for name in cli.COMMANDS:
        parts += ["", f"## saelab {name}", "", "```text", help_of(name), "```"]
    return "\n".join([*parts, ""])


def help_of(command: str) -> str:
    """What ``saelab COMMAND --help`` prints, without colours."""
    from saelab import cli

    text = io.StringIO()
    kept = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ.update(COLUMNS=str(WIDTH), NO_COLOR="1")
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def columns(table: dict[str, tuple[Any, str]]) -> str:
    """A Markdown table of the columns of a parquet file: name, type, meaning."""
    lines = ["| column | type | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {kind} | {text} |" for name, (kind, text) in table.items()), ""])


def main(output: Path = OUTPUT) -> None:
    """Write every generated page below ``output``; a page whose text has not changed keeps its date."""
    from saelab.features import schema
    from saelab.viz import LIGHT, style_sheet

    pages = {f"reference/{name}": page for name, page in reference(public_modules()).items()}
    pages["commands.md"] = commands()
    pages["feature-columns.md"] = columns(schema.FEATURE_COLUMNS)
    pages["example-columns.md"] = columns(schema.EXAMPLE_COLUMNS)
    # Tokens with their activations in the tutorials.
    pages["static/tokens.css"] = style_sheet(LIGHT).removeprefix("<style>").removesuffix("</style>")
    for name, page in pages.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != page:
            path.write_text(page, encoding="utf-8")
    for path in (output / "reference").iterdir():
        if f"reference/{path.name}" not in pages:
            path.unlink()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
