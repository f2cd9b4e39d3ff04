"""NaN in every uninitialised tensor, and an interpreter in which reductions do not crawl."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


def quicken_interpreter() -> None:
    """Reduce with numpy where Triton's interpreter would call Python for each element; the results are the same.

    The class is private: where it has another shape, the tests are slow and that is all.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    reduce_ops = getattr(interpreter, "ReduceOps", None)
    if reduce_ops is None or not hasattr(reduce_ops, "apply_impl"):
        return
    original, fast = reduce_ops.apply_impl, {tl.standard._xor_combine: np.bitwise_xor}

    def apply_impl(self, operands):
        ufunc = fast.get(self.combine_fn)
        if ufunc is None or self.axis is None:
            return original(self, operands)
        data = operands[0].handle.data
        return self.to_tensor(ufunc.reduce(data, axis=self.axis, keepdims=self.keep_dims), operands[0].dtype)

    reduce_ops.apply_impl = apply_impl


if os.environ.get("TRITON_INTERPRET") == "1":
    quicken_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter is slow: on the pretended GPU, where only devices are watched, one case is enough."""
    items[:] = [item for item in items if not _repeated(getattr(item, "callspec", None))]


def _repeated(call: Any) -> bool:
    if call is None or "triton@pretended" not in (call.params.get("backend"), call.params.get("device")):
        return False
    return call.params.get("name", "ordinary") != "ordinary"


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
