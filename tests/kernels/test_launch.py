"""Kernels run on the GPU that holds their tensors, whichever is the process's current one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import saelab.kernels
from saelab.kernels.triton import launch

FOLDER = Path(saelab.kernels.__file__).parent / "triton"


def launches(source: str) -> list[int]:
    """The lines that launch something themselves: calls of a subscripted name, such as ``kernel[grid](...)``."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Subscript)]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_no_kernel_is_launched_past_the_guard(path: Path) -> None:
    expected = 1 if path.stem == "launch" else 0
    assert len(launches(path.read_text(encoding="utf-8"))) == expected, "use saelab.kernels.triton.launch.launch"


def test_the_check_sees_a_launch() -> None:
    assert launches("code.dot_kernel[(n,)](x, y, **shape)\nlaunch(code.dot_kernel, (n,), x)\nvalues[0] + 1") == [1]


class OnSecondGpu(torch.Tensor):
    """A tensor that says where it is."""

    is_cuda = True  # pyright: ignore
    device = torch.device("cuda", 1)  # pyright: ignore


def test_the_tensors_gpu_is_current_during_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    current, seen = [torch.device("cuda", 0)], []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: seen.append((grid, current[-1], args[0], constants))

    monkeypatch.setattr(torch.cuda, "device", device)
    x = torch.ones(2).as_subclass(OnSecondGpu)
    launch.launch(Kernel(), (3,), 7, x, BLOCK=16)
    launch.launch(Kernel(), (3, 0), 7, x, BLOCK=16)  # no program
    launch.launch(Kernel(), (2,), 8, torch.ones(2), BLOCK=16)
    assert [(grid, str(where), first) for grid, where, first, _ in seen] == [
        ((3,), "cuda:1", 7),
        ((2,), "cuda:0", 8),
    ]
    assert seen[0][3] == {"BLOCK": 16} and len(current) == 1
