"""``saelab plan``: what training a large SAE takes on 1 to 512 devices, what limits it, and how to start it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import tyro

from saelab.cli.console import out, parse, print_json
from saelab.distributed.plan import Machine, Plan, Work, layouts
from saelab.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained, on how many devices, and the rates of the machine."""

    work: tyro.conf.OmitArgPrefixes[Work] = dataclasses.field(default_factory=Work)
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Numbers of devices to compare."""
    tokens: float = 1e10
    """Tokens to train on, for hours and price."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, which are written while the training goes on."""
    machine: tyro.conf.OmitArgPrefixes[Machine] = dataclasses.field(default_factory=Machine)
    parts: bool = False
    """Print memory, traffic and time part by part too."""
    json: bool = False
    """Print the layouts as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Print the fastest layout that fits for each number of devices, and the lines that start it."""
    options = parse(Options, "plan", args, "Estimate memory, traffic and time of distributed training by formula.")
    check(options)
    best = []
    for gpus in options.gpus:
        found = layouts(options.work, gpus, options.machine) if gpus > 0 else []
        if not found:
            raise UserError(f"no layout of {gpus} devices divides batch_size and d_sae; choose powers of two")
        best.append(found[0])
    if options.json:
        print_json([content(p, options) for p in best])
        return
    for line in overview(best, options):
        out.print(line, markup=False, soft_wrap=True)
    for line in ["", *parts(best)] if options.parts else []:
        out.print(line, markup=False, soft_wrap=True)
    for line in assumptions(best, options):
        out.print(line, markup=False, soft_wrap=True)
    out.print("\nTo start it (with your own cache, variant and folder):", markup=False)
    for one in best:
        for line in (launch(one, options.work, options.machine), batch(one, options.work, options.machine)):
            out.print(line, markup=False, soft_wrap=True)


def check(options: Options) -> None:
    """UserError for a size, a rate or a number that cannot be."""
    work = options.work
    for name in ("d_in", "d_sae", "k", "batch_size", "d_out", "k_aux", "cache_bytes"):
        if (value := getattr(work, name)) is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if not 0 <= work.dead <= 1:
        raise UserError(f"dead={work.dead} must be a share of the latents, 0 to 1")
    if not options.gpus:
        raise UserError("gpus names no number of devices; give one or more, such as --gpus 8 64")
    rates = vars(options.machine) | {"tokens": options.tokens, "checkpoint_minutes": options.checkpoint_minutes}
    for name, value in rates.items():
        if not (0 < value < math.inf or (name == "price" and value == 0)):
            raise UserError(f"{name}={value} must be positive and finite")


def content(one: Plan, options: Options) -> dict[str, object]:
    """A layout as JSON."""
    hours = one.device_hours(options.tokens)
    return dataclasses.asdict(one) | {
        "bottleneck": one.bottleneck,
        "limit": one.limit,
        "fits": one.total_memory_gb <= options.machine.memory_gb,
        "device_hours": hours,
        "price": hours * options.machine.price,
        "torchrun": launch(one, options.work, options.machine),
        "sbatch": batch(one, options.work, options.machine),
    }


def overview(plans: Sequence[Plan], options: Options) -> list[str]:
    """One line per number of devices; not a table that a narrow terminal would cut."""
    machine = options.machine
    rows = [["devices", "data x dict", "GB each", "MB sent", "ms a step", "tokens/s", "hours", "device-hours", "price"]]
    ends = ["limit"]
    for p in plans:
        hours = p.device_hours(options.tokens)
        row = [str(p.gpus), f"{p.data_size} x {p.dict_size}", f"{p.total_memory_gb:.1f}"]
        row += [f"{sum(p.traffic_mb.values()):,.0f}", f"{1e3 * p.step_seconds:,.0f}", f"{p.tokens_per_second:,.0f}"]
        rows.append([*row, f"{hours / p.gpus:,.1f}", f"{hours:,.0f}", f"{hours * machine.price:,.0f}"])
        fits = p.total_memory_gb <= machine.memory_gb
        ends.append(f"{p.limit}: {p.bottleneck}" if fits else f"memory: does not fit {machine.memory_gb:g} GB")
    if not machine.price:
        rows = [row[:-1] for row in rows]
    return [f"{line}  {end}" for line, end in zip(aligned(rows), ends)]


def assumptions(plans: Sequence[Plan], options: Options) -> list[str]:
    """What the numbers rest on, in sentences."""
    m, work = options.machine, options.work
    lines = [
        f"\nComputed by formula, not measured; hours are for {options.tokens:g} tokens.",
        f"Assumed of a device: {m.matmul_tflops:g} Tflop/s (bf16), {m.memory_tbs:g} TB/s and {m.memory_gb:g} GB of "
        f"memory; {m.node} in a node, each of which sends {m.fast_gbs:g} GB/s inside it and {m.slow_gbs:g} GB/s to "
        f"others, and takes {m.host_gbs:g} GB/s from the node's memory.",
        f"Assumed of a node: it reads the cache at {m.feed_gbs:g} GB/s and writes checkpoints at {m.write_gbs:g} GB/s.",
        f"Assumed of the run: {work.dead:.0%} dead latents, products in {work.precision}, moments in {work.moments}, "
        f"{work.cache_bytes} bytes a number in the cache, parameters {work.placement} on devices that share a batch.",
        "The parts of a step are added, without overlap; only reading and checkpoints go on meanwhile.",
    ]
    slow = [p for p in plans if p.checkpoint_seconds > 60 * options.checkpoint_minutes]
    if slow:
        p = slow[0]
        lines.append(
            f"A checkpoint of {p.checkpoint_gb:,.0f} GB takes {p.checkpoint_seconds / 60:,.1f} minutes to write on "
            f"{p.gpus} devices, longer than the {options.checkpoint_minutes:g} between two."
        )
    return lines


def launch(one: Plan, work: Work, machine: Machine) -> str:
    """The command line that starts a layout, on the first node where there are several."""
    train = f"train CACHE --d-sae {work.d_sae} --k {work.k} --batch-size {work.batch_size} --out RUN"
    if work.moments != "fp32":
        train += f" --moments {work.moments}"
    if one.gpus == 1:
        return f"saelab {train}"
    here = min(one.gpus, machine.node)
    nodes = -(-one.gpus // machine.node)
    where = "" if nodes == 1 else f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
    return f"torchrun {where}--nproc-per-node {here} -m saelab {train} --dict-ranks {one.dict_size}"


def batch(one: Plan, work: Work, machine: Machine) -> str:
    """The line that queues it with SLURM."""
    here, nodes = min(one.gpus, machine.node), -(-one.gpus // machine.node)
    first = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
    line = launch(one, work, machine).replace("HOST:", f"{first}:")
    return f"sbatch --nodes {nodes} --ntasks-per-node 1 --gpus-per-node {here} --wrap 'srun {line}'"


def parts(plans: Sequence[Plan]) -> list[str]:
    """Memory, traffic and time part by part, one column per number of devices."""
    rows = [[*(str(p.gpus) for p in plans), "devices"]]
    for unit, factor, name in (("GB", 1.0, "memory_gb"), ("MB sent", 1.0, "traffic_mb"), ("ms", 1e3, "seconds")):
        for part in dict.fromkeys(part for p in plans for part in getattr(p, name)):
            values = [factor * getattr(p, name).get(part, 0.0) for p in plans]
            rows.append([*(f"{value:,.1f}" for value in values), f"{unit}: {part}"])
    rows.append([*(f"{1e3 * p.feed_seconds:,.1f}" for p in plans), "ms: reading the cache, meanwhile"])
    rows.append([*(f"{p.checkpoint_seconds:,.1f}" for p in plans), "s: writing a checkpoint, meanwhile"])
    return [f"{line}  {row[-1]}" for line, row in zip(aligned([row[:-1] for row in rows]), rows)]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns that end one below the other; a terminal may wrap them, but loses nothing."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
