"""Padding on the left, and models that read it as text.

Attention is told by a mask which columns are padding. A state that runs through the text has to be kept clean of them
in each implementation, and some do not: their texts are run in groups of equal length.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.structure import children, modules, underlying

# What transformers' implementations of states take padding out with.
_MASKS = ("apply_mask_to_padding_states", "create_recurrent_attention_mask")


def masks_padding(model: nn.Module) -> bool:
    """Whether padding on the left leaves the real tokens of a text as they are without it.

    transformers marks classes that keep a state. One whose code takes no padding out of it is said to read padding,
    also where a newer version does it in another way: groups of equal length are right in any case.
    """
    root = underlying(model)
    if not getattr(type(root), "_is_stateful", False) or _convolutions(root):
        return True
    sources = {sys.modules.get(type(module).__module__) for module in root.modules()}
    return any(hasattr(source, name) for source in sources for name in _MASKS)


@contextmanager
def padding_masked(root: nn.Module, mask: Int[Tensor, "batch length"]) -> Iterator[None]:
    """A pass over tokens of which those with 0 in ``mask`` are padding; UserError for a model that reads padding."""
    if not masks_padding(root):
        raise UserError(
            f"{type(root).__name__} keeps a state that takes padding for text, so the texts of a batch must have "
            "equally many tokens; give one text at a time"
        )
    with ExitStack() as stack:
        for module in _convolutions(root):
            stack.callback(module.register_forward_hook(lambda _m, _a, x: x * mask[..., None].to(x)).remove)
        yield


def _convolutions(root: nn.Module) -> list[nn.Module]:
    """What RecurrentGemma's convolutions read. Its recurrence starts anew at position 0, where padding stands too, so
    that padding reaches a text through the convolution before it alone, which reads zeros in front of a text."""
    return [children(m)["linear_x"] for _, m in modules(root) if {"linear_x", "conv_1d", "rg_lru"} <= {*children(m)}]


def equally_long(lengths: Sequence[int], most: int | None = None) -> Iterator[list[int]]:
    """The places of rows in groups of one length, at most ``most`` in each."""
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        for start in range(0, len(rows), most or len(rows)):
            yield rows[start : start + (most or len(rows))]


def unpadded(columns: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"]) -> Int[Tensor, "batch tokens"]:
    """Rows of equally many tokens without the padding."""
    return columns[mask.bool()].reshape(len(columns), -1)


def lengths_of(mask: Int[Tensor, "batch length"]) -> list[int]:
    """How many tokens of each row are no padding."""
    return torch.sum(mask != 0, dim=1).tolist()
