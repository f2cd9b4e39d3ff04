"""Speed of the kernels: ``python -m saelab.bench.kernels`` checks parity first, then times."""
