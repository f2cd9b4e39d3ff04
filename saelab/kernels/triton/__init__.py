"""The GPU backend: Triton kernels behind the functions of :mod:`saelab.kernels.reference.backend`."""
