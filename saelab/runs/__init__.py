"""A trained SAE as one object: its path, weights, provenance and measurements."""

from saelab.runs.given import as_run
from saelab.runs.run import Run

__all__ = ["Run", "as_run"]
