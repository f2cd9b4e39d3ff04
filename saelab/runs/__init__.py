"""A trained SAE as one object: its weights and provenance, where it lies, and what was measured on it."""

from saelab.runs.run import Run, as_run

__all__ = ["Run", "as_run"]
