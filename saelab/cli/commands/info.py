"""``saelab info``: print versions, kernels and devices, for bug reports."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Sequence

import torch

from saelab import kernels
from saelab._version import __version__
from saelab.cli.console import console, out, parse, print_json
from saelab.kernels import compiling, dispatch

PACKAGES = ("torch", "transformer-lens", "transformers", "triton", "numba", "numpy", "streamlit")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to do besides, and the output format."""

    warm: bool = False
    """Compile the CPU kernels, so that no later command has to; that takes about 20 seconds, once."""
    json: bool = False
    """Print the facts as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Print the facts."""
    options = parse(Options, "info", args, "Print versions, devices and the kernel backend in use.")
    if options.warm:
        begun = time.perf_counter()
        console.print("compiling the CPU kernels that are not compiled yet")
        done = compiling.warm_up()
        said = f"ready after {time.perf_counter() - begun:.1f} s" if done else f"no: {dispatch.obstacle('numba')}"
        console.print(f"CPU kernels: {said}", markup=False)
    facts = {
        "saelab": __version__,
        "python": platform.python_version(),
        "kernels": kernels.describe(),
        "kernels in bf16": kernels.describe(torch.bfloat16),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: _version(name) for name in PACKAGES},
        **{f"{name} not used": why for name in ("triton", "numba") if (why := dispatch.failed_import(name))},
    }
    if options.json:
        print_json(facts)
        return
    for name, value in facts.items():
        out.print(f"{name:<17} {value if value is not None else 'not installed' if name in PACKAGES else 'none'}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
