"""The devices that tests run on: the CPU, and a GPU where there is one (marked ``gpu``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def devices() -> list[Any]:
    """Values of a parameter ``device``: ``cpu``, and ``cuda`` where PyTorch has a GPU."""
    gpu = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
    return ["cpu", *gpu]


EVERY_DEVICE = pytest.mark.parametrize("device", devices())
