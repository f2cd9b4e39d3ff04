"""The language model that an SAE was trained on, with what is recorded of its weights."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.lm.record import ModelRecord
from saelab.runs.run import Run


def model_record(run: Run, below: Path | None = None) -> ModelRecord:
    """The run's language model, with what its own files, its index or the cache it was trained on record of the
    weights; what none of them records is empty. With ``below`` a cache that is not in that folder is not opened."""
    known = run.recorded.get("language_model") or (run.index.meta.get("language_model") if run.index else None)
    found, cache = ModelRecord.from_json(known), run.metadata.get("cache")
    outside = below is not None and cache and not Path(cache).resolve().is_relative_to(below.resolve())
    if not found.fingerprint and cache and not outside:  # a run of 0.1.0
        with contextlib.suppress(UserError, OSError):
            opened = ActivationCache(cache)
            if opened.fingerprint == run.metadata.get("cache_fingerprint"):
                found = ModelRecord.from_manifest(opened.manifest)
    return dataclasses.replace(found, name=run.model_name or found.name)


def untrained_start(run: Run) -> int:
    """Positions at the start of a text that the SAE was not trained on, by its own files, else by its index.

    Where neither says so it is the BOS token, if texts begin with one.
    """
    for known in (run.metadata, run.index.meta if run.index else {}):
        if isinstance(found := known.get("skip_first"), int) and found >= 0:
            return found
    return int(bool(run.metadata.get("prepend_bos", True)))
