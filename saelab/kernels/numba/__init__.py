"""The compiled CPU backend: numba kernels behind the functions of :mod:`saelab.kernels.reference.backend`."""
