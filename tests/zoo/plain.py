"""What plain Hugging Face models give, by torch's own hooks: the oracle of the zoo. Nothing of saelab is used here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zoo.families import Family

Change = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def hooked(model: Any, family: Family, block: int, place: tuple[str, str, Any], change: Change) -> Iterator[None]:
    """``change`` the first input, or the output, of a module of a block inside the ``with`` block."""
    path, side, _ = place
    module = model.get_submodule(f"{family.blocks}.{block}.{path}".rstrip("."))

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def after(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)((change(output[0]), *output[1:]))
        return change(output)

    if side == "in":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    with handle:
        yield


@torch.no_grad()
def read(model: Any, family: Family, block: int, point: str, ids: Tensor) -> Tensor:
    """The activations ``[batch, position, d]`` at a point."""
    place = family.places[point]
    assert place is not None
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    with hooked(model, family, block, place, keep):
        model(input_ids=ids, use_cache=False)
    return place[2](seen[0].reshape(*ids.shape, -1))


def gradient(model: Any, family: Family, block: int, point: str, ids: Tensor) -> Tensor:
    """The gradient of the summed next-token loss at a point, by a zero that is added there.

    Between the sublayers it is added to what the first of them contributes, which the stream contains as a summand.
    """
    place = family.places[point]
    assert place is not None
    if point == "hook_resid_mid" and place[1] == "in":
        place = family.places["hook_attn_out"]
        assert place is not None
        factor = float(place[2](torch.ones(1)))
    else:
        factor = 1.0
    zero: list[Tensor] = []

    def add(x: Tensor) -> Tensor:
        zero.append(torch.zeros_like(x).requires_grad_())
        return x.detach() + zero[0] if not x.requires_grad else x + zero[0]

    with torch.enable_grad(), hooked(model, family, block, place, add):
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        (found,) = torch.autograd.grad(loss, zero)
    found = found.reshape(*ids.shape, -1)
    if point == "hook_resid_mid":
        return found / factor
    # Of a multiple of a module's output it is that much smaller.
    return place[2](found) / float(place[2](torch.ones(found.shape[-1])).flatten()[0]) ** 2


@torch.no_grad()
def continuation(model: Any, family: Family, block: int, vector: Tensor, ids: Tensor, length: int) -> Tensor:
    """Greedy continuation of one text under a vector added to a block's output, by whole passes without a cache."""
    place = family.places["hook_resid_post"]
    assert place is not None
    with hooked(model, family, block, place, lambda x: x + vector):
        for _ in range(length):
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -length:]
