"""``saelab inspect``: what an SAE file of any tool contains, and what is unusual about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from saelab.cli.console import out, parse, print_json
from saelab.cli.opening import find_target
from saelab.cli.placement import computing_device
from saelab.data.cache import ActivationCache
from saelab.runs import Run
from saelab.runs.inspection import inspect


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatHints:
    """What the user can say about a file that does not record it."""

    k: int | None = None
    """For a bare overcomplete state dict: latents per token, or pursuit steps."""
    pursuit: bool = False
    """For a bare overcomplete state dict: it belongs to a matching pursuit SAE."""
    threshold: float | None = None
    """For a bare overcomplete state dict: the running threshold of a BatchTopK SAE, in raw units."""
    input_scale: float | None = None
    """For an SAE of SAELens or Llamascopium that was trained on scaled activations: the factor, if no file has it."""

    is_sae: bool = False
    """Take a file for an SAE that says nothing of itself and looks like a transcoder; `convert` keeps that."""

    def hints(self) -> dict[str, Any]:
        """The hints that were given, as keyword arguments of the readers."""
        said = {"k": self.k, "pursuit": self.pursuit or None, "threshold": self.threshold}
        said |= {"input_scale": self.input_scale, "is_sae": self.is_sae or None}
        return {name: value for name, value in said.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Options(FormatHints):
    """What to look at."""

    path: tyro.conf.Positional[str]
    """File, folder or hub id (hf://org/repo/path) of an SAE, whichever tool wrote it."""
    cache: Path | None = None
    """Activation cache to count dead latents and measure the reconstruction on."""
    device: str = "cpu"
    """Where that is measured: cpu, cuda, cuda:1, mps, auto."""
    json: bool = False
    """Print the facts as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Print the facts, then anything unusual."""
    options = parse(
        Options,
        "inspect",
        args,
        "Print what an SAE file contains: format, shapes, norms, hook point, and anything unusual.",
    )
    cache = None if options.cache is None else cache_of(options.path, options.cache, options.hints())
    facts = inspect(options.path, cache, device=computing_device(options.device), **options.hints())
    if options.json:
        print_json(facts)
        return
    for name, value in facts.items():
        if name == "notes":
            continue
        if name == "known_from":
            for key, how in value.items():
                out.print(f"{key + ' from':<22} {how}", markup=False, soft_wrap=True)
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_short(entry)}" for key, entry in value.items()) or "-"
        out.print(f"{name:<22} {_short(value)}", markup=False)
    for note in facts["notes"]:
        out.print(f"note: {note}", markup=False)


def cache_of(path: str, folder: Path, hints: dict[str, Any]) -> ActivationCache:
    """The cache, for a transcoder with its target."""
    cache, run = ActivationCache(folder), Run.open(path, **hints)
    return cache.with_target(ActivationCache(find_target(run, cache))) if run.sae.transcodes else cache


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
