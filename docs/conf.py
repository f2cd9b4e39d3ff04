"""Settings of the documentation site: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import saelab  # noqa: E402

generate.main()

project = "saelab"
author = "saelab maintainers"
copyright = "saelab maintainers, MIT licence"
version = release = saelab.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated/*-columns.md"]
html_theme = "furo"
html_static_path = ["_generated/static"]
html_css_files = ["tokens.css"]
html_title = f"saelab {release}"
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autoclass_content = "both"  # the options of a variant are described in its constructor
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


held: list[str] = []


def before_napoleon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Prepare a docstring: ``|u|`` is a magnitude here, not a substitution of reStructuredText.

    The docstring of a property is kept from napoleon, which would read "None: neither" as a type and a description.
    """
    generated = ("Alias for field number", "Create new instance of")  # written by NamedTuple
    lines[:] = [magnitudes(line) for line in lines if not line.startswith(generated)]
    if what in {"attribute", "data", "property"}:
        held[:], lines[:] = lines, []


def after_napoleon(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give a property its docstring back."""
    if what in {"attribute", "data", "property"}:
        lines[:] = held


def magnitudes(line: str) -> str:
    """The line with every ``|`` outside of literals escaped."""
    parts = line.split("``")
    return "``".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(parts))


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
