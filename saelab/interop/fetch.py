"""Fetching other people's checkpoints from the Hugging Face hub, by ``org/repo`` and a path in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from saelab.errors import UserError, first_line

# org/repo, then optionally a folder or file in it; no empty parts, no dots that climb.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(/[\w.-]+)*")
REACH = "check its name, the connection and your token"
WANTED = ("cfg.json", "config.json", "hyperparams.json", "*.safetensors", "*.npz", "*.pt", "*.pth", "README.md")


def split_id(hub_id: str) -> tuple[str, str]:
    """Repository and path in it of ``org/repo/path``."""
    if not HUB_ID.fullmatch(hub_id) or ".." in hub_id:
        raise UserError(f"{hub_id!r} is neither a file here nor a hub id such as org/repo or org/repo/folder")
    parts = hub_id.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def download(hub_id: str, revision: str | None = None) -> Path:
    """Fetch the folder or file ``org/repo/path`` (only formats that hold weights) and return where it lies."""
    repo, inside = split_id(hub_id)
    patterns: list[str] = [f"{inside}/{name}" for name in WANTED] + [inside] if inside else [*WANTED]
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, endpoint=endpoint()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{repo} could not be fetched from the hub ({first_line(error)}); {REACH}") from error
    found = root / inside
    if not found.exists():
        raise UserError(f"{repo} has nothing at {inside!r}; look at its files on the hub")
    return found


def endpoint() -> str | None:
    """Another hub than the public one, as huggingface_hub's own variable says."""
    return os.environ.get("HF_ENDPOINT") or None
