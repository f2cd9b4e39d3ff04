"""Eval mode for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in eval mode, and afterwards, also after an error, in the mode from before."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
