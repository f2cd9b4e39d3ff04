"""Bytes that processes send each other, compared with the formula: ``python -m saelab.bench.distributed``.

Trains one SAE on several processes (gloo) in every layout, and sets three figures side by side, in bytes a step and
process: the formula of :func:`saelab.distributed.plan.traffic_per_step`, what the tensors handed to collectives amount
to, and what went through the loopback interface, headers included. The last counts every program on the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from saelab.bench import command
from saelab.bench.timing import write_out
from saelab.data.cache import ActivationCache
from saelab.distributed.plan import traffic_per_step
from saelab.distributed.sharding import build_shard
from saelab.distributed.world import end_world, start_world
from saelab.errors import UserError
from saelab.training import TrainConfig, train_steps


@dataclass(frozen=True)
class Options:
    """Sizes of the comparison; the defaults are those of docs/benchmarks.md."""

    d_in: int = 576
    """Width of the activations."""
    d_sae: int = 4608
    """Latents."""
    k: int = 32
    """Latents per token."""
    batch_size: int = 1024
    """Tokens per step, over all processes."""
    steps: int = 4
    """Steps that are counted, in each layout."""
    processes: int = 4
    """Processes; the layouts are all ways to divide them into data and dictionary ranks."""
    out: Path | None = None
    """JSON file to write."""


def check(options: Options) -> None:
    """Refuse sizes that do not divide over the processes, before they are started."""
    processes, each = options.processes, options.d_sae // options.processes
    for name, number in {"--d-sae": options.d_sae, "--batch-size": options.batch_size}.items():
        if number % processes:
            raise UserError(f"{name} {number} does not divide over {processes} processes; take a multiple")
    if options.k > each:
        raise UserError(f"--k {options.k} exceeds the {each} latents of a process; give fewer processes")


def measure(options: Options, folder: Path) -> list[dict[str, Any]]:
    """Per layout: ``dict_ranks``, and the three figures by purpose (``formula`` and ``counted``) and ``wire``."""
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn((options.steps + 1) * options.batch_size, options.d_in, generator=generator)
    ActivationCache.from_tensors(folder / "cache", acts, held_out=0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (options, port, folder), nprocs=options.processes)
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("layout-*.json"))]


def layouts(processes: int) -> list[int]:
    """The numbers of dictionary ranks that divide the processes."""
    return [ranks for ranks in range(1, processes + 1) if processes % ranks == 0]


def _worker(rank: int, options: Options, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    world = {"RANK": rank, "WORLD_SIZE": options.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    for dict_ranks in layouts(options.processes):
        _layout(options, dict_ranks, folder)
    end_world()


def _layout(options: Options, dict_ranks: int, folder: Path) -> None:
    """Train in one layout; the first step, which compiles and connects, is not counted."""
    parallel = start_world(dict_ranks, timeout_s=300)
    sae = build_shard("topk", options.d_in, options.d_sae, 0, parallel, k=options.k)
    # AuxK sends more, and how much depends on how many latents are dead.
    config = TrainConfig(epochs=1, batch_size=options.batch_size, aux_weight=0.0)
    run = train_steps(sae, ActivationCache(folder / "cache"), config, parallel=parallel)
    next(run)
    parallel.barrier()
    before, sent = Counter(parallel.traffic), _loopback()
    for _ in islice(run, options.steps):
        pass
    parallel.barrier()
    wire = (_loopback() - sent) / options.steps / options.processes
    run.close()
    if parallel.is_main:
        sizes = (options.batch_size, options.d_in, options.d_sae, options.k, parallel.data_size, dict_ranks)
        counted = {name: value / options.steps for name, value in (parallel.traffic - before).items()}
        result = {"dict_ranks": dict_ranks, "formula": traffic_per_step(*sizes), "counted": counted, "wire": wire}
        (folder / f"layout-{dict_ranks:04d}.json").write_text(json.dumps(result), encoding="utf-8")


def _loopback() -> int:
    """Bytes that the loopback interface has sent since the machine started."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text(encoding="utf-8"))


def table(results: list[dict[str, Any]], processes: int) -> Table:
    """Megabytes a step and process; what the formula leaves out is shown as counted."""
    columns = ("data x dictionary ranks", "purpose", "formula", "counted", "through the interface")
    shown = Table(*columns, box=None, pad_edge=False)
    for result in results:
        ranks = result["dict_ranks"]
        layout = f"{processes // ranks} x {ranks}"
        names = [name for name in result["formula"] | result["counted"] if _of(result, name)]
        for name in names:
            formula = f"{result['formula'][name] / 1e6:.3f}" if name in result["formula"] else ""
            shown.add_row(layout, name, formula, f"{result['counted'].get(name, 0) / 1e6:.3f}")
        totals = (sum(result["formula"].values()), sum(result["counted"].values()), result["wire"])
        formula, counted, wire = (f"{total / 1e6:.3f}" for total in totals)
        shown.add_row(layout, "all", formula, counted, wire)
    return shown


def _of(result: dict[str, Any], name: str) -> float:
    return result["formula"].get(name, 0) + result["counted"].get(name, 0)


def main(args: Sequence[str] | None = None) -> None:
    """Print the comparison."""
    options = command.options(Options, "distributed", __doc__, args)
    check(options)
    folder = Path(tempfile.mkdtemp())
    try:
        results = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    console = Console(highlight=False)
    sizes = f"{options.batch_size} tokens, d_in {options.d_in}, d_sae {options.d_sae}, k {options.k}"
    console.print(f"megabytes sent per step and process: {sizes}")
    console.print(table(results, options.processes))
    write_out(options.out, results)


if __name__ == "__main__":
    command.run(main)
