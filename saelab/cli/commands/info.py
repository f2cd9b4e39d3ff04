"""``saelab info``: print versions, kernels and devices, for bug reports."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Sequence

import torch

from saelab import kernels
from saelab._version import __version__
from saelab.cli.console import out, parse, print_json
from saelab.kernels import dispatch

PACKAGES = ("torch", "transformer-lens", "transformers", "triton", "numba", "numpy", "streamlit")


@dataclasses.dataclass(frozen=True)
class Options:
    """The output format."""

    json: bool = False
    """Print the facts as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Print the facts."""
    options = parse(Options, "info", args, "Print versions, devices and the kernel backend in use.")
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
