"""The one place the version is written; every checkpoint records it."""

__version__ = "0.2.0"
