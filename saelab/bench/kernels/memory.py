"""Peak memory of one training step beyond weights, gradients and the optimizer's two moments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes(n: int, d_in: int, d_sae: int, k: int) -> float:
    """Measured in a fresh process, since freed memory of earlier work would hide what a step asks for."""
    command = [sys.executable, "-m", "saelab.bench.kernels.memory", *map(str, (n, d_in, d_sae, k))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(n: int, d_in: int, d_sae: int, k: int) -> float:
    from saelab.bench.kernels import steps

    small = torch.randn(64, 16)
    steps.ours(steps.Parameters(16, 64, "cpu"), small, 4)()  # libraries, threads and compiled code
    x, p = torch.randn(n, d_in), steps.Parameters(d_in, d_sae, "cpu")
    for parameter in p.all():
        parameter.grad = torch.zeros_like(parameter)
    p.optimizer.step()
    before = _status("VmRSS")
    p.optimizer.zero_grad()
    CLEAR.write_text("5", encoding="utf-8")  # the high-water mark starts anew
    for _ in range(2):
        steps.ours(p, x, k)()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """Kibibytes."""
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


if __name__ == "__main__":
    sys.stdout.write(f"{measure(*(int(part) for part in sys.argv[1:5])):.1f}\n")
