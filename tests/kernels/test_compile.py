"""Every Triton kernel compiles for real GPUs, keeps its registers and fits into shared memory; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
# Bytes of shared memory a program may use, from the vendors' tables.
SHARED = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024}
THREADS = 1024  # of one program, on every card
# A few spilled registers are cheap beside a row's traffic; more would mean that a tile is too large.
SPILLS = 32
KERNELS = {
    "firing_kernel",
    "report_kernel",
    "adam_kernel",
    "group_maxima_kernel",
    "group_keys_kernel",
    "select_kernel",
    "select_streamed_kernel",
    "reach_kernel",
    "gather_kernel",
    "latents_kernel",
    "parts_kernel",
    "dot_kernel",
    "fill_kernel",
    "pick_kernel",
    "error_kernel",
    "pursue_kernel",
    "chain_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])  # the third has more shared memory than one of them
def test_the_largest_configurations_compile(target: str) -> None:
    check(target, "--largest")


@pytest.mark.minutes
@pytest.mark.parametrize("target", SHARED)
def test_every_configuration_compiles(target: str) -> None:
    check(target)


def check(target: str, *options: str) -> None:
    # Triton is either interpreted or compiled for the life of a process, so this needs one of its own.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_all.py"), target, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {line["kernel"] for line in lines} == KERNELS
    for line in lines:
        assert line["spills"] <= SPILLS, f"spills registers: {line}"
        assert line["threads"] <= THREADS, f"cannot be launched: {line}"
        assert line["shared"] <= SHARED[target], f"needs more shared memory than the chip has: {line}"
