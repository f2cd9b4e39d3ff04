"""How the compiled CPU kernels are built and run: cached on disk, without the GIL, on as many threads as PyTorch.

A kernel works on items ``lo .. hi`` of its problem; its ``prange`` driver deals out such ranges. The OpenMP layer is
preferred because it shares PyTorch's pool: a second pool would compete with PyTorch's threads, which keep spinning
for milliseconds after each matrix product. One thread, or a forked child (where OpenMP may not be used), runs the
kernel directly.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import torch
from numba.core import config, event
from torch import Tensor

from saelab.kernels import compiling

PARTS_PER_THREAD = 4  # ranges dealt out per thread, so that a slow range does not hold up the rest

_process = os.getpid()
_launching = threading.Lock()


class _Listener(event.Listener):
    """Passes on that one of our kernels is compiled; numba tells nothing where it finds one on disk."""

    def on_start(self, event: Any) -> None:
        function = getattr(event.data.get("dispatcher"), "py_func", None)
        if getattr(function, "__module__", "").startswith("saelab."):
            compiling.about_to_compile()

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Listener())


def compiled(parallel: bool = False, **fastmath: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile on first use, into numba's cache where one can be written (``NUMBA_CACHE_DIR`` names another place)."""
    options = {"nogil": True, "error_model": "numpy", "parallel": parallel, "fastmath": set(fastmath)}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError as error:  # neither the package's folder nor the user's is writable
            if "cannot cache" not in str(error):
                raise
            return numba.njit(**options)(function)

    return decorate


def launch(kernel: Callable[..., Any], driver: Callable[..., Any], count: int, *args: Any) -> None:
    """Run ``kernel(lo, hi, *args)`` over ``0 .. count`` on PyTorch's number of threads."""
    if count == 0:
        return
    most: int = config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    threads = min(torch.get_num_threads(), most, count)
    if threads <= 1 or os.getpid() != _process:
        kernel(0, count, *args)
        return
    # One launch at a time: the pool is as wide as the machine, and numba's own work queue may not be entered twice.
    with _launching, _openmp_first():
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            driver(min(count, threads * PARTS_PER_THREAD), count, *args)
        finally:
            numba.set_num_threads(before)


@contextmanager
def _openmp_first() -> Iterator[None]:
    """Numba picks the threading layer of the whole process at its first parallel launch: ask for OpenMP if it is this.

    The setting is put back, so that importing or running our kernels changes nothing else of numba's.
    """
    settings: Any = config
    before = settings.THREADING_LAYER_PRIORITY
    if settings.THREADING_LAYER == "default":  # NUMBA_THREADING_LAYER names none
        settings.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    try:
        yield
    finally:
        settings.THREADING_LAYER_PRIORITY = before


def array(tensor: Tensor) -> np.ndarray:
    """A C-contiguous view (or copy) of a CPU tensor; one layout keeps one compiled version of each kernel."""
    return tensor.detach().contiguous().numpy()


def empty(size: int) -> np.ndarray:
    """A float32 vector with undefined content."""
    return np.empty(size, np.float32)
