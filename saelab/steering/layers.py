"""One intervention at several layers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from saelab.errors import UserError
from saelab.lm.hook_names import layer_of
from saelab.lm.sites import blocks
from saelab.steering.interventions import VectorIntervention


def at_layers(
    model: nn.Module, intervention: VectorIntervention, layers: Sequence[int] | Literal["all"]
) -> list[VectorIntervention]:
    """The same change at the same place of several blocks: ``at_layers(model, ProjectOut(vector), "all")``.

    Each of them makes the whole change, so a strength that suits one layer is too much for ten; ``calibrate`` takes
    ``lambda s: at_layers(model, Add(vector, s), [4, 6, 8])``. UserError for an operation on a latent, whose code
    has a meaning at the SAE's own hook point only, and for a layer that the model does not have.
    """
    if not isinstance(intervention, VectorIntervention):
        raise UserError(
            f"{type(intervention).__name__} changes a latent, whose SAE has one layer; use Add, ProjectOut or Cap"
        )
    layer, count = layer_of(intervention.hook_name), len(blocks(model)[1])
    if layer is None:
        raise UserError(f"{intervention.hook_name} names no block, so it cannot be moved to other layers")
    wanted = list(range(count)) if isinstance(layers, str) and layers == "all" else _numbers(layers)
    if not wanted:
        raise UserError('layers is empty; give numbers of blocks, or "all"')
    if wrong := [number for number in wanted if not 0 <= number < count]:
        raise UserError(f"layer {wrong[0]} does not exist: the model has {count} blocks, 0 to {count - 1}")
    if len(set(wanted)) < len(wanted):
        raise UserError(f"layers {wanted} names one twice; name each layer once")
    before, after = re.split(rf"(?<=\.){layer}(?=\.|$)", intervention.hook_name, maxsplit=1)
    made: list[Any] = [dataclasses.replace(intervention, hook_name=f"{before}{number}{after}") for number in wanted]
    return made


def _numbers(layers: Any) -> list[int]:
    try:
        if isinstance(layers, str):
            raise TypeError(layers)
        return [int(number) for number in layers]
    except (TypeError, ValueError):
        raise UserError(f'layers={layers!r} is neither "all" nor a list of block numbers') from None


def parse_layers(text: str) -> list[int] | Literal["all"]:
    """``"4,6,8"``, ``"4-8"`` or ``"all"``."""
    if text == "all":
        return "all"
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UserError(f"--layers {text!r} is neither all nor numbers of blocks such as 4,6,8 or 4-8")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found
