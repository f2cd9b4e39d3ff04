"""Where a hook name lives in a model: plain Hugging Face modules and TransformerLens bridges alike.

A site is a module and a side of it (its input or its output), so that steering needs nothing but torch's own hooks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelab.errors import UserError, near_matches

_BLOCK_LISTS = ("layers", "h", "blocks", "block", "layer")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_POINTS = ("hook_resid_pre", "hook_resid_post", "hook_in", "hook_out", "hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class Site:
    """One side of one module of a model."""

    hook_name: str
    path: str  # of the module, in the Hugging Face model
    module: nn.Module
    side: str  # "input" or "output"

    def register(self, edit: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call ``edit`` with the activations ``[batch, position, d_in]``; what it returns takes their place.

        Returning None leaves them as they are.
        """
        if self.side == "input":

            def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
                if args:
                    new = edit(args[0])
                    return None if new is None else ((new, *args[1:]), kwargs)
                new = edit(kwargs["hidden_states"])
                return None if new is None else (args, {**kwargs, "hidden_states": new})

            return self.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            new = edit(output[0] if is_tuple else output)
            if new is None:
                return None
            return (new, *output[1:]) if is_tuple else new

        return self.module.register_forward_hook(after)


def underlying(model: nn.Module) -> nn.Module:
    """The module whose ``forward`` maps tokens to logits: a bridge's inner model, or the model itself."""
    return getattr(model, "original_model", model)


def width(model: nn.Module) -> int | None:
    """``d_model``, where the model's configuration tells it."""
    for config in (getattr(model, "cfg", None), getattr(underlying(model), "config", None)):
        for name in ("d_model", "hidden_size", "n_embd"):
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
    return None


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the model's transformer blocks."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in underlying(model).named_modules():
        inner = any(path.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and path.split(".")[-1] in _BLOCK_LISTS and not inner:
            found.append((path, module))
    if not found:
        raise UserError(f"{type(underlying(model)).__name__} has no list of transformer blocks that saelab knows")
    return max(found, key=lambda item: len(item[1]))


def locate(model: nn.Module, hook_name: str) -> Site:
    """The site of a TransformerLens hook name, or of the path of a Hugging Face module (its output)."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook_name)
    if match is None:
        return _by_path(model, hook_name)
    prefix, layers = blocks(model)
    index, point = int(match[1]), match[2]
    if index >= len(layers):
        raise UserError(f"{hook_name}: the model has {len(layers)} blocks, 0 to {len(layers) - 1}")
    if point not in _POINTS:
        raise UserError(f"cannot steer at {hook_name!r}: {near_matches(point, _POINTS)}")
    path, layer = f"{prefix}.{index}", layers[index]
    if point in {"hook_resid_pre", "hook_in"}:
        return Site(hook_name, path, layer, "input")
    if point in {"hook_resid_post", "hook_out"}:
        return Site(hook_name, path, layer, "output")
    name = _child(layer, point, hook_name)
    return Site(hook_name, f"{path}.{name}", layer.get_submodule(name), "output")


def layer_of(hook_name: str) -> int | None:
    """The block a hook name belongs to, read from the first number in it."""
    match = re.search(r"\.(\d+)(\.|$)", hook_name)
    return int(match[1]) if match else None


def _child(layer: nn.Module, point: str, hook_name: str) -> str:
    children = dict(layer.named_children())
    if "_original_component" in children:
        # A bridge's block keeps the model's own module, whose submodules are the ones that run.
        return f"_original_component.{_child(children['_original_component'], point, hook_name)}"
    # Gemma and OLMo 2 normalise a sublayer's output before adding it: that is what enters the residual stream.
    if point == "hook_mlp_out" and "post_feedforward_layernorm" in children:
        return "post_feedforward_layernorm"
    if point == "hook_attn_out" and "post_feedforward_layernorm" in children:
        return "post_attention_layernorm"
    for name in _ATTENTION if point == "hook_attn_out" else _MLP:
        if name in children:
            return name
    raise UserError(f"{hook_name}: none of {', '.join(children)} is the sublayer it names")


def _by_path(model: nn.Module, path: str) -> Site:
    root = underlying(model)
    try:
        return Site(path, path, root.get_submodule(path), "output")
    except AttributeError:
        prefix, layers = blocks(model)
        known = [f"blocks.{i}.{point}" for i in range(len(layers)) for point in _POINTS]
        known += [f"{prefix}.{i}" for i in range(len(layers))]
        raise UserError(f"unknown hook {path!r}: {near_matches(path, known)}") from None
