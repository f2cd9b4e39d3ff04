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
    """Latent number -> ``{"label": ..., "note": ..., "rating": ...}``, each only where given; empty without a file."""
    path = Path(run_folder) / NOTES
    if not path.is_file():
        return {}
    with damaged(path, "correct or remove it"):
        content = json.loads(path.read_bytes())
        return {int(latent): {k: str(v) for k, v in entry.items()} for latent, entry in content.items()}


def write_note(run_folder: Path | str, latent: int, label: str = "", note: str = "") -> None:
    """Save one latent's label and note; its rating stays, and what is empty is removed. Other latents' stay too."""
    _write(run_folder, latent, label=label.strip(), note=note.strip())


def rate(run_folder: Path | str, latent: int, rating: int) -> None:
    """Save a rating from 1 to 5, or remove it with 0."""
    _write(run_folder, latent, rating=str(rating) if rating else "")


def _write(run_folder: Path | str, latent: int, **entries: str) -> None:
    with _lock:
        notes: dict[Any, Any] = dict(read_notes(run_folder))
        entry = notes.pop(latent, {}) | entries
        if any(entry.values()):
            notes[latent] = {"label": "", "note": ""} | {name: text for name, text in entry.items() if text}
        write_json(Path(run_folder) / NOTES, {str(key): notes[key] for key in sorted(notes)})
