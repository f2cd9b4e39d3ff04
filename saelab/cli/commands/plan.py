"""``saelab plan``: what a large SAE costs on many GPUs, and which part of a step limits it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import tyro
from rich.table import Table

from saelab.cli.console import out, parse, print_json
from saelab.distributed.plan import Machine, Plan, layouts
from saelab.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """Size of the SAE, number of GPUs, and the rates of the machine."""

    d_in: int = 4096
    """Width of the activations."""
    d_sae: int = 2**20
    """Latents."""
    k: int = 64
    """Latents per token."""
    batch_size: int = 131_072
    """Tokens per step, over all GPUs."""
    gpus: tuple[int, ...] = (8, 64, 512)
    """Numbers of GPUs to compare."""
    machine: tyro.conf.OmitArgPrefixes[Machine] = dataclasses.field(default_factory=Machine)
    json: bool = False
    """Print the layouts as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Print the fastest layout that fits, for each number of GPUs, part by part."""
    options = parse(Options, "plan", args, "Estimate memory, traffic and time of distributed training by formula.")
    for name in ("d_in", "d_sae", "k", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be at least 1")
    if not options.gpus:
        raise UserError("gpus names no number of GPUs; give one or more, such as --gpus 8 64")
    for name, value in vars(options.machine).items():
        if not 0 < value < math.inf:
            raise UserError(f"{name}={value} must be positive and finite")
    sizes = (options.batch_size, options.d_in, options.d_sae, options.k, options.machine)
    best = []
    for gpus in options.gpus:
        found = layouts(gpus, *sizes) if gpus > 0 else []
        if not found:
            raise UserError(f"no layout of {gpus} GPUs divides batch_size and d_sae; choose powers of two")
        best.append(found[0])
    if options.json:
        print_json([dataclasses.asdict(p) | {"bottleneck": p.bottleneck} for p in best])
    else:
        out.print(table(best, options.machine))
        out.print("computed by formula, without overlap; the rates of the machine are assumptions (see --help)")


def table(plans: Sequence[Plan], machine: Machine) -> Table:
    """One column per number of GPUs."""
    shown = Table("per GPU and step", *(f"{p.gpus} GPUs" for p in plans), box=None, pad_edge=False)
    shown.add_row("data x dictionary ranks", *(f"{p.data_size} x {p.dict_size}" for p in plans))
    for part in plans[0].memory_gb:
        shown.add_row(f"GB: {part}", *(f"{p.memory_gb[part]:.1f}" for p in plans))
    fits = [f"{p.total_memory_gb:.1f}{'' if p.total_memory_gb <= machine.memory_gb else ' (too much)'}" for p in plans]
    shown.add_row("GB: all", *fits)
    for part in plans[0].traffic_mb:
        shown.add_row(f"MB sent: {part}", *(f"{p.traffic_mb[part]:,.1f}" for p in plans))
    for part in plans[0].seconds:
        shown.add_row(f"ms: {part}", *(f"{1e3 * p.seconds[part]:,.1f}" for p in plans))
    shown.add_row("ms: all", *(f"{1e3 * sum(p.seconds.values()):,.1f}" for p in plans))
    shown.add_row("tokens per second", *(f"{p.tokens_per_second:,.0f}" for p in plans))
    shown.add_row("hours for 1e10 tokens", *(f"{1e10 / p.tokens_per_second / 3600:,.1f}" for p in plans))
    shown.add_row("bottleneck", *(p.bottleneck for p in plans))
    return shown
