"""NaN in every uninitialised tensor, an interpreter in which reductions do not crawl, and fewer of its cases."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saelab.kernels.cases import CASES


def quicken_interpreter() -> None:
    """Make Triton's interpreter do once what it does for each element or each call; the results are the same.

    The classes are private: where they have another shape, the tests are slow and that is all.
    """
    from triton.runtime import interpreter

    if hasattr(getattr(interpreter, "ReduceOps", None), "apply_impl"):
        reduce_with_numpy(interpreter.ReduceOps)
    names = ("GridExecutor", "InterpretedFunction", "InterpreterError", "_patch_lang")
    if all(hasattr(interpreter, name) for name in names) and hasattr(interpreter.InterpretedFunction, "rewrite"):
        prepare_once_per_launch(interpreter)


def reduce_with_numpy(reduce_ops: Any) -> None:
    """Reduce with numpy where the interpreter would call Python for each element."""
    import triton.language as tl

    original, fast = reduce_ops.apply_impl, {tl.standard._xor_combine: np.bitwise_xor}

    def apply_impl(self, operands):
        ufunc = fast.get(self.combine_fn)
        if ufunc is None or self.axis is None:
            return original(self, operands)
        data = operands[0].handle.data
        return self.to_tensor(ufunc.reduce(data, axis=self.axis, keepdims=self.keep_dims), operands[0].dtype)

    reduce_ops.apply_impl = apply_impl


def prepare_once_per_launch(interpreter: Any) -> None:
    """Replace the language's functions once per launch for what a kernel calls, not at each of a thousand calls."""
    launch, call = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__
    prepared: set[Any] = set()

    def launch_anew(self, *args, **kwargs):
        prepared.clear()  # the end of a launch takes the replacements back
        return launch(self, *args, **kwargs)

    def call_prepared(self, *args, **kwargs):
        if self.fn not in prepared:
            prepared.add(self.fn)
            return call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call_prepared


if os.environ.get("TRITON_INTERPRET") == "1":
    quicken_interpreter()


BOTH_SIGNS = {"ordinary", "ties"}  # cases that run in every test, signed and unsigned
TURNS = 3  # one in so many of the interpreter's cases runs in every run, and the others in the one that takes minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter is slow: its cases take turns in being signed and in being run, the pretended GPU has one case.

    A case runs in every third of its tests, and the cases begin at different tests.
    """
    if torch.cuda.is_available():
        return
    items[:] = [item for item in items if not _spared(getattr(item, "callspec", None))]
    seen = defaultdict[str, int](int)
    for item in items:
        call = getattr(item, "callspec", None)
        if item.path.parent != Path(__file__).parent or call is None or not _has_turns(call):
            continue
        name = call.params["name"]
        if ([*CASES].index(name) + seen[name]) % TURNS:
            item.add_marker(pytest.mark.minutes)
        seen[name] += 1


def _place(call: Any) -> str | None:
    return call.params.get("backend") or call.params.get("device")


def _has_turns(call: Any) -> bool:
    """Whether a test is one of the interpreter's many cases."""
    return _place(call) == "triton" and call.params.get("name") in {*CASES} - BOTH_SIGNS


def _spared(call: Any) -> bool:
    """Whether a test is left out: on the pretended GPU devices are watched, not numbers."""
    place = call and _place(call)
    name = call and call.params.get("name", "ordinary")
    if place == "triton@pretended":
        return name != "ordinary"
    if place != "triton" or name not in CASES or name in BOTH_SIGNS or "signed" not in call.params:
        return False
    return call.params["signed"] == bool([*CASES].index(name) % 2)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel forgets to write is NaN (or a huge index), not what luck left there."""

    def poisoned(make):
        def allocate(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(2**40 if tensor.dtype == torch.int64 else 119)

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    # numpy's own empty stays as it is: numba looks it up by identity whenever it compiles, that is on a fresh machine.
    yield
