"""Resolve the name of an SAE: a path on this machine, or a hub id whose files are fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from saelab.copies import fetched
from saelab.errors import UserError, first_line
from saelab.files import url_of
from saelab.interop.collections import on_hub
from saelab.interop.formats import FORMATS
from saelab.layout import CARD, CONFIG, EVALUATION, EXTRA, WEIGHTS

# org/repo, then optionally a folder or file in it; no empty parts, no dots that climb.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(/[\w.:+-]+)*")
PREFIX = re.compile(r"hf:/{1,2}")  # pathlib makes one slash of two
REACH = "check its name, the connection and your token"
WEIGHT_FILES = {".pt", ".pth", ".bin", ".npz", ".safetensors"}
OWN = (CONFIG, WEIGHTS, EXTRA, EVALUATION, CARD)


def resolve(name: Path | str) -> Path:
    """The file or folder ``name`` on this machine, fetched first where it is on the hub.

    ``hf://org/repo`` and ``hf://org/repo/path/in/it`` are looked up on the hub. ``org/repo`` without the prefix is
    looked up only where there is neither such a path nor a folder ``org`` here, so that a mistyped path is never sent
    to the hub. The same holds for the name of a known collection, ``gemma-scope-2b-pt-res/layer_12/...``.
    Of a run behind another URL (``s3://bucket/run``) it is the local copy, brought up to date.
    """
    text = str(name)
    if prefix := PREFIX.match(text):
        return download(text[prefix.end() :])
    if (copy := fetched(name)) is not None:
        return copy
    if Path(text).exists():
        return Path(text)
    top = Path(text).parts[0] if "/" in text else ""
    if not HUB_ID.fullmatch(text) or ".." in text:
        raise UserError(f"{text} does not exist; give a file, a folder, or a hub id such as hf://org/repo")
    if Path(top).exists():
        raise UserError(f"{text} does not exist in {top} here; for a repository of the hub write hf://{text}")
    try:
        return download(on_hub(text) or text)
    except UserError as error:
        raise UserError(f"{text} does not exist here, and neither does a folder {top}; on the hub, {error}") from error


def full_name(name: Path | str) -> str:
    """The name under which ``name`` is found again: its absolute path if it exists here, or the hub id."""
    text = str(name)
    if prefix := PREFIX.match(text):
        return f"hf://{text[prefix.end() :]}"
    if (url := url_of(name)) is not None:
        return url
    if Path(text).exists():
        return str(Path(text).resolve())
    return f"hf://{place}" if (place := on_hub(text)) else text


def split_id(hub_id: str) -> tuple[str, str]:
    """Repository and path in it of ``org/repo/path``."""
    if not HUB_ID.fullmatch(hub_id) or ".." in hub_id:
        raise UserError(f"{hub_id!r} is not a hub id such as org/repo or org/repo/folder")
    parts = hub_id.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def download(hub_id: str, revision: str | None = None) -> Path:
    """Fetch the folder or file ``org/repo/path`` (the files of known formats) and return its local path."""
    repo, inside = split_id(hub_id)
    wanted = wanted_files()
    patterns = [f"{inside}/{name}" for name in wanted] + [inside] + _beside(inside, wanted) if inside else wanted
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, endpoint=endpoint()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{repo} could not be fetched from the hub ({first_line(error)}); {REACH}") from error
    found = root / inside
    if not found.exists():
        raise UserError(f"{repo} has nothing at {inside!r}; look at its files on the hub")
    return found


def _beside(inside: str, wanted: Sequence[str]) -> list[str]:
    """The files of settings that may lie beside a single file, under their own name or that of the file."""
    file = PurePosixPath(inside)
    names = {name.replace("*", file.stem) for name in wanted if name.endswith(".json") and "/" not in name}
    return [str(file.with_name(name)) for name in sorted(names)] if file.suffix in WEIGHT_FILES else []


def wanted_files() -> list[str]:
    """Patterns of the files that can belong to an SAE, relative to its folder."""
    return sorted({*OWN, *(pattern for form in FORMATS.values() for pattern in form.files)})


def endpoint() -> str | None:
    """The address of another hub than the public one, from huggingface_hub's environment variable."""
    return os.environ.get("HF_ENDPOINT") or None
