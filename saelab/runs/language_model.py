"""The language model that an SAE was trained on, with what is recorded of its weights."""

from __future__ import annotations

import contextlib
import dataclasses

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.lm.record import ModelRecord
from saelab.runs.run import Run


def model_record(run: Run) -> ModelRecord:
    """The run's language model, with what its own files, its index or the cache it was trained on record of the
    weights; what none of them records is empty."""
    known = run.recorded.get("language_model") or (run.index.meta.get("language_model") if run.index else None)
    found, cache = ModelRecord.from_json(known), run.metadata.get("cache")
    if not found.fingerprint and cache:  # a run of 0.1.0
        with contextlib.suppress(UserError, OSError):
            opened = ActivationCache(cache)
            if opened.fingerprint == run.metadata.get("cache_fingerprint"):
                found = ModelRecord.from_manifest(opened.manifest)
    return dataclasses.replace(found, name=run.model_name or found.name)
