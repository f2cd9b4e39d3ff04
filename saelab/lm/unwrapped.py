"""The Hugging Face model behind a bridge: its parameters by name, and a plain model over the same tensors.

A bridge replaces modules of the model it wraps by components of its own, so parameter names and module paths have to be
derived from the components.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saelab.lm.structure import WRAPPED, inside, modules, underlying

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_LIBRARIES = ("transformer_lens", "transformers", "accelerate", "torch")  # whose own hooks change nothing


def plain_skeleton(model: TransformerBridge | nn.Module) -> nn.Module | None:
    """An empty Hugging Face model of the same shape, with fused attention where its architecture has it; None for any
    other model."""
    original: Any = getattr(model, "original_model", model)
    config = getattr(original, "config", None)
    if config is None or not hasattr(type(original), "_from_config"):
        return None
    config = copy.deepcopy(config)
    config.output_attentions = False
    with torch.device("meta"):
        # None lets transformers choose: asking for fused attention by name fails where an architecture has none.
        return type(original)._from_config(config, attn_implementation=None)


def plain_model(model: TransformerBridge) -> nn.Module | None:
    """A Hugging Face model over the bridge's own tensors, no copy; None where tensors are missing or reshaped."""
    plain: Any = plain_skeleton(model)
    if plain is None:
        return None
    tensors = hf_tensors(model)
    for name, wanted in [*plain.named_parameters(), *plain.named_buffers()]:
        found = tensors.get(name)
        if (
            found is None
            or found.shape != wanted.shape
            or isinstance(found, nn.Parameter) != isinstance(wanted, nn.Parameter)
        ):
            return None
        # Not load_state_dict(assign=True): it passes over buffers that files do not hold (rotary frequencies), and
        # gives the bridge's own parameters the requires_grad of the empty model.
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, found)
    plain.tie_weights()
    return plain.eval()


def hf_tensors(model: TransformerBridge | nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by Hugging Face name; tensors that the bridge derived have names of their own."""
    found: dict[str, Tensor] = {}

    def visit(module: nn.Module, path: str) -> None:
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found.setdefault(f"{path}.{leaf}".lstrip("."), tensor)
        for key, child in module.named_children():
            visit(child, path if key == WRAPPED else _join(path, key, child))

    visit(underlying(model), "")
    # Some components take the name of another place (a vision tower); by where they stand all have their own.
    for path, module in modules(model):
        own = inside(module)
        for leaf, tensor in [*own._parameters.items(), *own._buffers.items()]:
            if tensor is not None:
                found.setdefault(f"{path}.{leaf}".lstrip("."), tensor)
    return found


def _join(path: str, key: str, child: nn.Module) -> str:
    """The name of a component's module: its ``name`` below its parent, or the full path that a block gives."""
    name = getattr(child, "name", None) if WRAPPED in child._modules else None
    own = f"{path}.{key}".lstrip(".")
    return own if not name or own == name else f"{path}.{name}".lstrip(".")


def has_hooks(bridge: TransformerBridge) -> bool:
    """Whether hooks are set on a bridge, at its hook points or on its modules, by anyone but the libraries."""
    if any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_dict.values()):
        return True
    hooks = [
        hook
        for module in bridge.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return any(not (getattr(hook, "__module__", None) or "").startswith(_LIBRARIES) for hook in hooks)


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters want no gradient in this block: only what follows an activation that wants one is then recorded."""
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
