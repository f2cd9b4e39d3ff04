"""Further processes of a command on this machine, one for each device."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import torch

from saelab.cli.console import console


@contextmanager
def beside(commands: Sequence[Sequence[str]]) -> Iterator[None]:
    """Run ``saelab`` with each list of arguments while the block lasts, then wait for the processes.

    All of them, this one included, share the CPU's threads equally. If the block raises, they are asked to stop (with
    SIGTERM, upon which a command saves what it has). What one that failed said last is printed.
    """
    threads = max(1, torch.get_num_threads() // (len(commands) + 1))
    if commands:
        torch.set_num_threads(threads)
    stopped = False
    started: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    try:
        for command in commands:
            said = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            line = [sys.executable, "-m", "saelab", *command]
            null = subprocess.DEVNULL
            started.append((subprocess.Popen(line, stdin=null, stdout=null, stderr=said, env=environment), said))
        yield
    except BaseException:
        stopped = True
        for process, _ in started:
            process.terminate()
        raise
    finally:
        for process, said in started:
            if process.wait() and not stopped:
                said.seek(0)
                last = said.read().decode(errors="replace").strip().splitlines()[-1:]
                console.print(f"a worker ended with {process.returncode}: {''.join(last)}", markup=False)
            said.close()
