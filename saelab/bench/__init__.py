"""Benchmarks: ``python -m saelab.bench.NAME`` prints each figure that the documentation quotes."""
