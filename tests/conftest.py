"""Shared set-up: one thread, a fixed seed, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "SAELAB_SLOW" not in os.environ:
        for item in items:
            if item.get_closest_marker("minutes"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; set SAELAB_SLOW=1"))


@pytest.fixture(scope="module", autouse=True)
def _seed_module() -> None:
    """For the module's own fixtures: they run before any test of it, and must not depend on what ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
