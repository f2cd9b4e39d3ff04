"""The choice of the implementation that runs an op.

CUDA or ROCm tensors go to ``triton``, float32 tensors on the CPU to ``numba``, everything else to ``reference``. The
environment variable ``SAELAB_KERNELS`` or :func:`use_backend` names one instead; a named backend that cannot take a
tensor raises ValueError instead of falling back. Reading a cache is not computing: its op, ``gather_rows``, works on
the CPU whatever the device of the SAE, so that there a backend for other devices (triton) gives way to the usual one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "numba", "triton")
VARIABLE = "SAELAB_KERNELS"
_named: ContextVar[str | None] = ContextVar("saelab_kernels", default=None)


def backend(x: Tensor | None = None) -> str:
    """The backend that an op on ``x [...]`` runs on: ``reference``, ``numba`` or ``triton``.

    Without ``x``: for float32 tensors on the device that training would use (CUDA where there is one).
    """
    return _choose(_device(), torch.float32) if x is None else _choose(x.device.type, x.dtype)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _choose(device: str, dtype: torch.dtype, strict: bool = True) -> str:
    name = _named.get() or os.environ.get(VARIABLE) or None
    if name is None or (not strict and name in BACKENDS and obstacle(name, device, dtype)):
        wanted = {"cpu": "numba", "cuda": "triton"}.get(device)
        return wanted if wanted and not obstacle(wanted, device, dtype) else "reference"
    reason = obstacle(name, device, dtype)
    if reason:
        raise ValueError(f"kernel backend {name!r} was asked for but {reason}")
    return name


def obstacle(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """Why backend ``name`` cannot take tensors of this device and dtype; None when it can."""
    if name not in BACKENDS:
        return f"there is none of that name; choose from {', '.join(BACKENDS)}"
    if name == "reference":
        return None
    missing = _missing(name)
    if missing:
        return missing
    if name == "numba":
        if device != "cpu":
            return f"it works on CPU tensors, not on {device}"
        return None if dtype == torch.float32 else f"it computes in float32, not in {dtype}"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it works on CUDA or ROCm tensors (on CPU tensors only under TRITON_INTERPRET=1)"
    return None if dtype in (torch.float32, torch.float16, torch.bfloat16) else f"it does not take {dtype}"


def refusal(device: str) -> str | None:
    """Why the backend that was named cannot compute in float32 on this kind of device; None if it can, or none was."""
    name = _named.get() or os.environ.get(VARIABLE)
    reason = obstacle(name, device) if name else None
    return f"kernel backend {name!r} was asked for but {reason}" if reason else None


def failed_import(name: str) -> str | None:
    """Why a backend whose package is installed cannot be imported; None where it can, or is not installed."""
    reason = _missing(name)
    return None if reason is None or "not installed" in reason else reason


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of this context on the named backend."""
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; choose from {', '.join(BACKENDS)}")
    if _missing(name):
        raise ValueError(f"kernel backend {name!r} was asked for but {_missing(name)}")
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def describe(dtype: torch.dtype = torch.float32) -> str:
    """One line for logs: the backend that runs the ops on ``dtype`` here, its version, and why not a faster one.

    On a CPU only float32 is compiled: bfloat16 products are emulated on most CPUs, and slower than float32 ones.
    """
    named = _named.get() or os.environ.get(VARIABLE)
    if named and (reason := obstacle(named, _device(), dtype)):
        return f"none ({named} is asked for, but {reason})"
    name = _choose(_device(), dtype)
    if name == "numba":
        screened = ", screened in bfloat16" if multiplies_bfloat16() else ""
        return f"numba {_version('numba')} on {torch.get_num_threads()} CPU threads{screened}"
    if name == "triton":
        return f"triton {_version('triton')} on {_card()}"
    if named:
        return f"reference (plain PyTorch {torch.__version__}, as asked for)"
    wanted = "triton" if _device() == "cuda" else "numba"
    return f"reference (plain PyTorch {torch.__version__}; {wanted} is not used: {obstacle(wanted, _device(), dtype)})"


@cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16 products (others emulate them, slowly)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def implementation(x: Tensor, strict: bool = True) -> ModuleType:
    """The module whose functions run the ops on ``x``.

    Without ``strict``, a named backend that cannot take ``x`` gives way to the one that would be chosen.
    """
    return importlib.import_module(f"saelab.kernels.{_choose(x.device.type, x.dtype, strict)}.backend")


@cache
def _missing(name: str) -> str | None:
    """Why a backend cannot be used at all: its package is not there, or fails to import (numba under a later NumPy)."""
    if name == "reference":
        return None
    if importlib.util.find_spec(name) is None or importlib.util.find_spec(f"saelab.kernels.{name}.backend") is None:
        return f"{name} is not installed"
    try:
        importlib.import_module(f"saelab.kernels.{name}.backend")
    except Exception as error:  # whatever a package raises that meets versions it does not know
        text = (str(error).strip().splitlines() or [""])[0][:200]
        return f"{name} cannot be imported ({type(error).__name__}: {text})"
    return None


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU (interpreted)"
