"""A trained SAE as one object: its path, weights, provenance and measurements."""

from saelab.runs.run import Run, as_run

__all__ = ["Run", "as_run"]
