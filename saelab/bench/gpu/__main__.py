"""Right and how fast on a GPU, in one run: ``python -m saelab.bench.gpu [--budget 400]``, or ``make gpu``.

Parity with float64 comes first; where it is red, nothing is timed. Then the kernels, whole steps beside a dense step
in bf16 and the structure of sparsify, a feature index, and training runs from a cache on disk. Host waits and launches
of a step are counted. It needs PyTorch and what the kernels, SAEs, caches and training of saelab import (the index also
pyarrow and SciPy), keeps to its budget of seconds, and writes what it has found after every stage. ``--device cpu``
runs the same code in tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import saelab
from saelab import kernels
from saelab.bench import command
from saelab.bench.gpu import end_to_end, parity, speed
from saelab.devices import pick_device
from saelab.errors import UserError
from saelab.kernels.dispatch import BACKENDS, obstacle

SHAPES: list[speed.Shape] = [(4096, 768, 24_576, 32), (8192, 2304, 65_536, 64), (8192, 4096, 131_072, 64)]
TINY: list[speed.Shape] = [(8, 16, 96, 4)]
SCATTERED = 20e9  # bytes of the rows that the structure of sparsify makes; more does not fit beside the rest


class Report:
    """The findings so far, on disk after every stage, and the time that is left."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.end, self.found = out, time.perf_counter() + budget, {}
        self.failed: list[str] = []

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def stage(self, name: str, least: float, work: Callable[[], Any]) -> None:
        """Run a stage if there is time for it; one that fails does not end the others."""
        begun = time.perf_counter()
        if self.left < least:
            self.found[name] = {"skipped": f"{self.left:.0f} s were left"}
        else:
            say(f"{name} ({self.left:.0f} s left)")
            try:
                self.found[name] = work()
            except Exception:
                self.failed.append(name)
                self.found[name] = {"error": traceback.format_exc()[-3000:]}
                say(traceback.format_exc()[-1500:])
        self.found.setdefault("seconds", {})[name] = round(time.perf_counter() - begun, 1)
        self.out.write_text(json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def environment(device: torch.device) -> dict[str, Any]:
    """What ran, and on what."""
    found: dict[str, Any] = {
        "saelab": saelab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": kernels.describe(),
        "device": str(device),
    }
    for name in ("triton", "numba"):
        found[name] = obstacle(name, "cuda" if name == "triton" else "cpu") or "works"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "memory_gb": round(card.total_memory / 1e9, 1), "sms": card.multi_processor_count}
    return found


def check(report: Report, device: torch.device, tiny: bool) -> list[str]:
    """Parity of every backend that runs on the device; returns what is red."""
    size = (5, 8, 64, 3) if tiny else (512, 768, 16_384, 32)
    for backend in reversed(BACKENDS):
        if obstacle(backend, device.type) is None and (backend != "reference" or not tiny):
            huge = backend == "triton" and not tiny
            report.stage(f"parity, {backend}", 5, lambda b=backend, h=huge: parity.check(b, device, size, h))
    results = [value for name, value in report.found.items() if name.startswith("parity")]
    return [red for result in results for red in result.get("red", [result.get("error")]) if red]


def steps(report: Report, shape: speed.Shape, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Milliseconds per step of saelab and of its rivals, and the counts of ours."""
    n, d_in, d_sae, k = shape
    several = 2 if tiny else 20 if d_sae < 60_000 else 8
    makes: dict[str, Callable[[], Any]] = {
        "saelab, bf16": lambda: speed.Trainer(shape, device, "bf16"),
        "saelab, fp32": lambda: speed.Trainer(shape, device, "fp32"),
        "saelab batch_topk, bf16": lambda: speed.Trainer(shape, device, "bf16", "batch_topk"),
        "dense, bf16": lambda: speed.Dense(shape, device),
    }
    if 2 * n * k * d_in < SCATTERED:
        makes["structure of sparsify, bf16"] = lambda: speed.RowScatter(shape, device)
    found: dict[str, Any] = {"milliseconds": {}}
    for name, make in makes.items():
        if report.left < 10:
            break
        trainer = make()
        try:
            found["milliseconds"][name] = speed.per_step(trainer.step, device, several)
            if name == "saelab, bf16":
                found["counts"] = speed.counts(trainer.step, device)
        finally:
            trainer.close()
            del trainer
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The steps of every shape as lines of text."""
    lines = [f"{'tokens x d_in x d_sae x k':<26} {'step':<28} {'ms':>9} {'M tokens/s':>11} {'of dense':>9}"]
    for name, stage in found.items():
        if not name.startswith("steps ") or "milliseconds" not in stage:
            continue
        shape, times = name.removeprefix("steps "), stage["milliseconds"]
        dense = times.get("dense, bf16")
        for what, ms in times.items():
            ratio = f"{ms / dense:.2f}x" if dense else ""
            speed_ = int(shape.split("x")[0]) / ms / 1e3
            lines.append(f"{shape:<26} {what:<28} {ms:>9.2f} {speed_:>11.2f} {ratio:>9}")
        for what, number in stage.get("counts", {}).items():
            if isinstance(number, int | float):
                lines.append(f"{shape:<26} {what + ' of a step':<28} {number:>9.1f}")
    described = found.get("index", {})
    if "index/encode" in described:
        seconds, encoding = described["index_seconds"], described["encode_seconds"]
        lines.append(f"index of {described['latents']} latents, {described['tokens']} tokens: {seconds:.1f} s; "
                     f"encoding alone {encoding:.1f} s, {described['index/encode']:.2f}x")  # fmt: skip
    for name, run in found.get("training from a cache", {}).items():
        if isinstance(run, dict) and run.get("tokens/s"):
            figures = f"{run['tokens/s'] / 1e6:.2f} M tokens/s, FVU {run['first fvu']:.3f} -> {run['last fvu']:.3f}"
            lines.append(f"from a cache, {name}: {figures}")
    return lines


def main(args: Sequence[str] | None = None) -> int:
    """Run the stages; 1 if something is wrong or failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m saelab.bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, or cpu for tiny sizes")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file to write")
    options = parser.parse_args(args)
    try:
        command.check_out(options.out)
        device = pick_device(options.device)
    except UserError as error:
        parser.error(str(error))  # in one line, without the packages of the command line
    tiny = device.type != "cuda"
    report = Report(options.out, options.budget)
    report.stage("environment", 0, lambda: environment(device))
    say(json.dumps(report.found["environment"]))
    red = check(report, device, tiny)
    say("parity: " + ("red, nothing is timed\n" + "\n".join(red) if red else "green"))
    if red:
        return 1
    for shape in TINY if tiny else SHAPES:
        name = "x".join(map(str, shape))
        report.stage(f"kernels {name}", 15, lambda s=shape: speed.kernel_times(s, device))
        report.stage(f"steps {name}", 15, lambda s=shape: steps(report, s, device, tiny))
    report.stage("index", 40, lambda: end_to_end.index(device, tiny))
    report.stage("training from a cache", 10, lambda: end_to_end.measure(device, tiny, lambda: report.left < 8))
    say("\n".join(table(report.found)))
    say(f"{options.out}; stages that failed: {', '.join(report.failed) or 'none'}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
