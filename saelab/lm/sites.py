"""Places in a running model where activations are read or replaced: one side of one module.

A site needs nothing but torch's own hooks, so it works on plain Hugging Face models and TransformerLens bridges alike.
On a bridge the names are those of :func:`saelab.lm.find_hook`; on a plain model, which has no table of names, they are
found by the structure of its blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelab.errors import UserError, near_matches
from saelab.lm.hooks import below_base, find_hook
from saelab.lm.unwrapped import WRAPPED

_BLOCK_LISTS = ("layers", "h", "blocks", "block", "layer")
# Point of a block -> the names its module has in the families of models; "" is the block itself.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_POINTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hook_resid_pre": ("in", ("",)),
    "hook_in": ("in", ("",)),
    "hook_resid_post": ("out", ("",)),
    "hook_out": ("out", ("",)),
    "hook_attn_out": ("out", _ATTENTION),
    "attn.hook_out": ("out", _ATTENTION),
    "hook_mlp_out": ("out", _MLP),
    "mlp.hook_out": ("out", _MLP),
}
# Gemma and OLMo 2 normalise a sublayer's output before adding it: that is what enters the residual stream.
_POST_NORMS = {"hook_attn_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"}

Edit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Site:
    """One side of one module of a model."""

    hook_name: str
    path: str  # of the module, in the Hugging Face model
    module: nn.Module
    side: str  # "out" or "in": its output or its first input

    def register(self, edit: Edit) -> RemovableHandle:
        """Call ``edit`` at this place; see :func:`register`."""
        return register(self.module, self.side, edit)


def register(module: nn.Module, side: str, edit: Edit) -> RemovableHandle:
    """Call ``edit`` with the output (``side="out"``) or first input (``"in"``) ``[batch, position, d_in]`` of a module.

    What it returns takes the activations' place; None leaves them as they are.
    """

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = edit(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return edit(output)
        new = edit(output[0])
        return None if new is None else (new, *output[1:])

    if side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


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
    """The site of a TransformerLens hook name, or of the path of a Hugging Face module (its output).

    UserError where the model has no such place, or none whose replacement is all that the later layers see: the
    middle of the residual stream, say, also reaches them past the module that a hook could act on.
    """
    root = underlying(model)
    if root is model:
        path, side = _on_plain(model, hook_name)
        return Site(hook_name, path, model.get_submodule(path), side)
    found: Any = find_hook(model, hook_name)  # pyright: ignore[reportArgumentType]
    if found.side == "inner" or (found.side == "in" and not re.fullmatch(r"blocks\.\d+\.hook_in", found.canonical)):
        raise UserError(
            f"{hook_name} is not the output of a module or the input of a block, so nothing can be put in its place; "
            "use a residual stream, attention or MLP output"
        )
    return Site(hook_name, found.module, _module_at(root, found.module), found.side)


def layer_of(hook_name: str) -> int | None:
    """The block a hook name belongs to, read from the first number in it."""
    match = re.search(r"\.(\d+)(\.|$)", hook_name)
    return int(match[1]) if match else None


def _module_at(root: nn.Module, path: str) -> nn.Module:
    """The module of a bridge that runs at a Hugging Face path."""
    module = root
    for name in path.split("."):
        # A component keeps the model's own module inside, and that one's children are the ones that run.
        inside = module.get_submodule(WRAPPED) if WRAPPED in module._modules else module
        module = inside.get_submodule(name)
    return module


def _on_plain(model: nn.Module, hook_name: str) -> tuple[str, str]:
    """Path and side of a hook name in a model that no bridge has read."""
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", hook_name)
    if match is None:
        return _path(model, hook_name), "out"
    prefix, layers = blocks(model)
    index, point = int(match[1]), match[2]
    if index >= len(layers):
        raise UserError(f"{hook_name}: the model has {len(layers)} blocks, 0 to {len(layers) - 1}")
    if point not in _POINTS:
        raise UserError(f"no place for {hook_name!r} in a plain model: {near_matches(point, _POINTS)}")
    side, names = _POINTS[point]
    children = dict(layers[index].named_children())
    if _POST_NORMS["hook_mlp_out"] in children and point in _POST_NORMS:
        names = (_POST_NORMS[point],)
    for name in names:
        if name == "" or name in children:
            return f"{prefix}.{index}.{name}".rstrip("."), side
    raise UserError(f"{hook_name}: none of {', '.join(children)} is the sublayer it names")


def _path(model: nn.Module, path: str) -> str:
    found = below_base(model, path, dict(model.named_modules()))
    if found is None:
        prefix, layers = blocks(model)
        known = [f"blocks.{i}.{point}" for i in range(len(layers)) for point in _POINTS]
        known += [f"{prefix}.{i}" for i in range(len(layers))]
        raise UserError(f"the model has no hook point {path!r}: {near_matches(path, known)}")
    return found
