"""Files that are installed with the package: the app, and trained SAEs.

In a checkout they are folders of the repository; an installed wheel has them under ``share/saelab``.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path, PurePosixPath

import saelab
from saelab.errors import UserError


def folder(name: str, proof: str) -> Path:
    """The folder ``name`` ("app" or "checkpoints"), recognised by the file ``proof`` in it.

    Raises:
        UserError: This installation does not have it.
    """
    checkout = Path(saelab.__file__).parents[1] / name
    if (checkout / proof).is_file():
        return checkout
    try:
        installed = importlib.metadata.files("saelab") or []
    except importlib.metadata.PackageNotFoundError:
        installed = []
    ending = PurePosixPath("share/saelab", name, proof).parts
    for file in installed:
        if file.parts[-len(ending) :] == ending:
            return Path(str(file.locate())).resolve().parent
    raise UserError(f"this installation of saelab has no {name} folder; reinstall it with: pip install 'saelab[app]'")


def app_script() -> Path:
    """The entrypoint of the app."""
    return folder("app", "streamlit_app.py") / "streamlit_app.py"


def checkpoints() -> Path:
    """The folder of trained SAEs, one run folder per variant; see the README.md in it."""
    return folder("checkpoints", "README.md")
