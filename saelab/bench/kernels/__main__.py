"""``python -m saelab.bench.kernels``: parity first, then times as ratios, with the floor they are measured against.

Candidates run in turn, one step each per round, so that a busy machine slows all of them alike; a ratio is the median
over rounds of the ratio within a round. No speed is shown when a parity check is red.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from saelab import kernels
from saelab.bench import command
from saelab.bench.kernels import steps
from saelab.bench.kernels.memory import peak_megabytes
from saelab.bench.kernels.parity import red_cases
from saelab.bench.timing import Clock, write_out
from saelab.errors import UserError
from saelab.kernels.dispatch import multiplies_bfloat16

Rounds = dict[str, list[float]]
GEMM, OURS = "encode GEMM alone", "step, topk"


@dataclass(frozen=True)
class Settings:
    """What to time. A shape is n x d_in x d_sae x k."""

    shape: tuple[str, ...] = ("4096x576x16384x32",)
    """Shapes of a training step."""
    pursuit: str = "1024x576x4096x32"
    """Shape of matching pursuit; empty skips it."""
    rounds: int = 5
    """Rounds after the first, which does not count."""
    dense: bool = True
    """Also time plain dense autograd, the slowest candidate."""
    peers_python: Path | None = None
    """Interpreter of an environment with the other packages."""
    out: Path | None = None
    """JSON file to write."""


def main(args: Sequence[str] | None = None) -> int:
    """Check parity, measure and print; returns the exit status."""
    settings = command.options(Settings, "kernels", __doc__, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = kernels.backend()
    red = red_cases(backend, device)
    if red:
        _say(f"parity is red on backend {backend}; no speed is shown", *red)
        return 1
    result: dict[str, object] = {"backend": kernels.describe(), "machine": _machine(device), "shapes": {}}
    _say(f"parity: green on every case · {kernels.describe()} · {_machine(device)}")
    for shape in settings.shape:
        report = _step_report(*command.shape_of(shape), settings, device)
        result["shapes"][shape] = report  # pyright: ignore
    if settings.pursuit:
        result["pursuit"] = _pursuit_report(*command.shape_of(settings.pursuit), settings, device)
    write_out(settings.out, result)
    return 0


def _step_report(n: int, d_in: int, d_sae: int, k: int, settings: Settings, device: str) -> dict[str, object]:
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(1)).to(device)
    p = steps.Parameters(d_in, d_sae, device)
    buffer, buffer16 = (torch.empty(n, d_sae, dtype=t, device=device) for t in (torch.float32, torch.bfloat16))
    candidates: dict[str, Callable[[], object]] = {
        GEMM: lambda: torch.mm(x, p.W_enc.detach(), out=buffer),
        OURS: steps.ours(p, x, k),
        "step, absolute topk": steps.ours(p, x, k, signed=True),
        "step, batch budget": steps.ours(p, x, k, per_batch=True),
        "structure of sparsify": steps.row_scatter(steps.Parameters(d_in, d_sae, device), x, k),
    }
    if settings.dense:
        candidates["dense autograd, default Adam"] = steps.dense(
            steps.Parameters(d_in, d_sae, device, column_major=False, fused=False), x, k
        )
    if device == "cpu" and multiplies_bfloat16():  # what screening has in place of the encode GEMM
        x16, W16 = x.bfloat16(), p.W_enc.detach().bfloat16()
        candidates["bfloat16 product alone"] = lambda: torch.mm(x16, W16, out=buffer16)
    candidates |= _parts(p, x, buffer, k)
    rounds = _interleaved(candidates, settings.rounds, device)
    _say(f"\nn={n} d_in={d_in} d_sae={d_sae} k={k}, median of {settings.rounds} rounds", _floor(n, d_in, d_sae, k))
    _table(rounds, GEMM, OURS)
    report: dict[str, object] = {"milliseconds": rounds, "ratios": _ratios(rounds, OURS)}
    if device == "cpu":
        report["peak_megabytes"] = peak_megabytes(n, d_in, d_sae, k)
        _say(f"peak memory beyond weights, gradients and optimizer: {report['peak_megabytes']:.0f} MB")
    if settings.peers_python:
        counterpart = {"SAELens AbsTopK": "step, absolute topk"}
        products = _ratios(rounds, GEMM)
        ours = defaultdict(lambda: products[OURS], {name: products[step] for name, step in counterpart.items()})
        report["peers"] = _peers(settings, "topk", (n, d_in, d_sae, k), ours)
    return report


def _parts(p: steps.Parameters, x: Tensor, z: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """The ops on their own, and what PyTorch would do instead."""
    code = kernels.select_topk(x, *p.encoder(), k=k)
    values = code.values.clone().requires_grad_()

    d_sae, d_in = p.W_dec.shape
    held = steps.Parameters(d_in, d_sae, str(x.device))
    for parameter in held.all():
        parameter.grad = torch.ones_like(parameter)

    def decode_and_back() -> None:
        sse, _ = kernels.sse(x, values, code.indices, code.row_ptr, p.W_dec, p.b_dec)
        sse.sum().backward()
        p.optimizer.zero_grad()

    return {
        "torch.topk of the product": lambda: z.topk(k, dim=1, sorted=False),
        "product and select": lambda: kernels.select_topk(x, *p.encoder(), k=k),
        "decode, loss and their gradients": decode_and_back,
        "Adam": held.optimizer.step,
    }


def _peers(
    settings: Settings, what: str, shape: tuple[int, ...], ours: Mapping[str, float]
) -> dict[str, dict[str, object]]:
    """The packages themselves, timed by the interpreter that has them.

    The processes do not run in turn, so each step is put against the bare product measured in its own; ``ours`` is
    what our counterpart of each takes, in times of the product.
    """
    script = Path(__file__).with_name("peers.py")
    command = [str(settings.peers_python), str(script), what, *map(str, shape), str(settings.rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{settings.peers_python} could not time the other packages ({said}); check what it has")
    found = json.loads(done.stdout.splitlines()[-1])
    for name, figures in found.items():
        figures["times_ours"] = figures["milliseconds"] / figures["gemm"] / ours[name]
        _say(
            f"  {name} ({figures['package']}): {figures['milliseconds']:.0f} ms, "
            f"{figures['times_ours']:.2f}x ours, each in times of the product"
        )
    return found


def _pursuit_report(n: int, d_in: int, d_sae: int, k: int, settings: Settings, device: str) -> dict[str, object]:
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(1)).to(device)
    report: dict[str, object] = {}
    product, rounds = torch.empty(n, d_sae, device=device), {}
    for name, train in (("training", True), ("evaluation", False)):
        # A dictionary each: in training both change theirs, and in evaluation ours may keep its Gram matrix.
        mine, theirs = (steps.Parameters(d_in, d_sae, device) for _ in range(2))
        candidates = {
            GEMM: lambda mine=mine: torch.mm(x, mine.W_dec.detach().T, out=product),
            "pursuit": steps.pursuit(mine, x, k, train),
            "structure of SAELens": steps.dense_pursuit(theirs, x, k, train),
        }
        rounds[name] = times = _interleaved(candidates, settings.rounds, device)
        _say(f"\nmatching pursuit, {name}, n={n} d_in={d_in} d_sae={d_sae} steps={k}")
        _table(times, "pursuit", "pursuit")
        report[name] = {"milliseconds": times, "ratios": _ratios(times, "pursuit")}
    if settings.peers_python:
        ours = {name: _ratios(times, GEMM)["pursuit"] for name, times in rounds.items()}
        report["peers"] = _peers(settings, "pursuit", (n, d_in, d_sae, k), ours)
    return report


def _interleaved(candidates: dict[str, Callable[[], object]], rounds: int, device: str) -> Rounds:
    clock = Clock(wait=lambda: _wait(device))
    clock.rounds(candidates, rounds)  # the turn before compiles and allocates
    return {name: [1e3 * seconds.wall for seconds in times] for name, times in clock.times.items()}


def _ratios(rounds: Rounds, ours: str) -> dict[str, float]:
    return {name: median(a / b for a, b in zip(times, rounds[ours])) for name, times in rounds.items()}


def _table(rounds: Rounds, floor: str, ours: str) -> None:
    to_ours, to_floor = _ratios(rounds, ours), _ratios(rounds, floor)
    _say(f"  {'':<34}{'median':>9}    {'/ ours':>7}  {'/ floor':>7}")
    for name, times in rounds.items():
        _say(f"  {name:<34}{median(times):9.1f} ms {to_ours[name]:7.2f}  {to_floor[name]:7.2f}")


def _floor(n: int, d_in: int, d_sae: int, k: int) -> str:
    """The model of what has to be done: one product, a few visits of n * k rows, one sweep of the optimizer."""
    gemm, sparse = 2 * n * d_in * d_sae, 2 * n * k * d_in
    moved = 4 * n * k * d_in * 4 + 2 * d_in * d_sae * 28
    return (
        f"model: encode {gemm / 1e9:.1f} GFLOP (dense autograd: 6 such), the rest {4 * sparse / 1e9:.2f} GFLOP; "
        f"{4 * n * d_sae / 1e6:.0f} MB of products pass through the cache, {moved / 1e9:.2f} GB of rows and Adam states"
    )


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    names = [line.partition(":")[2].strip() for line in about.splitlines() if line.startswith("model name")]
    name = f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    command.run(main)
