"""Write the API reference into ``docs/api``, from the docstrings; any warning stops it.

Run ``make docs``. Documented is what a package exports by ``__all__``, and the modules that users are sent to by name.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc

import saelab

OUTPUT = Path(__file__).parent / "api"
NAMED = (
    "saelab.files",
    "saelab.sae.weights",
    "saelab.data.synthetic",
    "saelab.data.text",
    "saelab.errors",
    "saelab.interop.hub",
    "saelab.kernels.reference.backend",
    "saelab.losses",
    "saelab.sparse",
    "saelab.steering.directions",
    "saelab.steering.vectors",
)


def public_modules() -> list[str]:
    """Packages with an ``__all__``, the variants, and ``NAMED``."""
    variants = {cls.__module__ for cls in saelab.VARIANTS.values()}
    found = [name for name in walk() if name in NAMED or name in variants or exports(name)]
    missing = set(NAMED) - set(found)
    if missing:
        raise SystemExit(f"no such module: {', '.join(sorted(missing))}")
    return found


def walk() -> Iterator[str]:
    """Every module of saelab by name, the commands left out: ``saelab COMMAND --help`` documents those."""
    yield "saelab"
    for module in pkgutil.walk_packages(saelab.__path__, "saelab."):
        if not module.name.startswith(("saelab.cli", "saelab.__main__")):
            yield module.name


def exports(name: str) -> list[str]:
    """``__all__`` of a module that runs on this machine; nothing where it has none."""
    if ".triton" in name or ".numba" in name or name.startswith("saelab.bench"):
        return []
    return list(getattr(importlib.import_module(name), "__all__", []))


def named_tuples() -> Iterator[type]:
    """The NamedTuple classes loaded so far; Python files their constructors under a module that does not exist."""
    for name in [name for name in sys.modules if name.startswith("saelab.")]:
        for value in vars(sys.modules[name]).values():
            if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
                yield value


def main(output: Path = OUTPUT) -> None:
    """Build the reference."""
    for name in saelab.__all__:  # loaded on first use, which pdoc does not do
        setattr(saelab, name, getattr(saelab, name))
    modules = public_modules()
    pdoc.render.configure(docformat="restructuredtext", show_source=False, footer_text=f"saelab {saelab.__version__}")
    for cls in list(named_tuples()):
        cls.__new__.__module__ = cls.__module__  # where its annotations can be resolved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*modules, output_directory=output)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
