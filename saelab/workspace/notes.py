"""A researcher's own labels and notes on latents, in ``notes.json`` of the run folder."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from saelab.errors import damaged
from saelab.files import write_json
from saelab.layout import NOTES

_lock = threading.Lock()  # two browser tabs may save at once


def read_notes(run_folder: Path | str) -> dict[int, dict[str, str]]:
    """Latent number -> ``{"label": ..., "note": ...}``; empty where nothing was written yet."""
    path = Path(run_folder) / NOTES
    if not path.is_file():
        return {}
    with damaged(path, "correct or remove it"):
        content = json.loads(path.read_bytes())
        return {int(latent): {k: str(v) for k, v in entry.items()} for latent, entry in content.items()}


def write_note(run_folder: Path | str, latent: int, label: str = "", note: str = "") -> None:
    """Save one latent's label and note; an empty pair removes it. Others' notes stay as they are on disk."""
    with _lock:
        notes: dict[Any, Any] = dict(read_notes(run_folder))
        notes.pop(latent, None)
        if label.strip() or note.strip():
            notes[latent] = {"label": label.strip(), "note": note.strip()}
        write_json(Path(run_folder) / NOTES, {str(key): notes[key] for key in sorted(notes)})
