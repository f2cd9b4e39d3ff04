"""Benchmarks: ``python -m saelab.bench.NAME`` prints the figures that the documentation quotes."""
