"""Places in a running model where activations are read or replaced: one side of one module.

A site uses only torch's own hooks, so it works on plain Hugging Face models and on TransformerLens bridges. On a
bridge, names are resolved by TransformerLens; on a plain model, which has no table of names, by the structure of its
blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelab.errors import UserError, near_matches
from saelab.lm.hook_names import below_base, module_path, resolve
from saelab.lm.unwrapped import WRAPPED

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

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
    "attn.hook_z": ("in", _ATTENTION),
    "attn.o.hook_in": ("in", _ATTENTION),
    "hook_mlp_out": ("out", _MLP),
    "mlp.hook_out": ("out", _MLP),
    "mlp.hook_post": ("in", _MLP),
    "mlp.out.hook_in": ("in", _MLP),
}
# Inputs that reach the later layers through their module alone, so that replacing them there is complete; others, such
# as the middle of the residual stream, also bypass the module.
_BLOCK_INPUTS = {"hook_resid_pre", "hook_in"}
_PROJECTION_INPUTS = {"attn.hook_z", "attn.o.hook_in", "mlp.hook_post", "mlp.out.hook_in"}
# The linear map at the end of a sublayer, in the families of models.
_PROJECTIONS = {"o_proj", "out_proj", "c_proj", "dense", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo"}
# Gemma and OLMo 2 normalise a sublayer's output before adding it: that is what enters the residual stream.
_POST_NORMS = {"hook_attn_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"}

Edit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Site:
    """One side of one module of a model, wherever the model is loaded."""

    hook_name: str  # TransformerLens name as asked for, e.g. blocks.9.hook_resid_post
    path: str  # of the module in the Hugging Face model, e.g. model.layers.9
    side: str  # "out" or "in": output or first input of that module; "inner" where it is neither
    canonical: str = ""  # TransformerBridge's own name, e.g. blocks.9.hook_out; "" on a plain model

    def register(self, model: nn.Module, edit: Edit) -> RemovableHandle:
        """Call ``edit`` with the activations ``[batch, position, d_in]`` at this place of ``model``, until the handle
        is removed; the handle is a context manager.

        The activations are replaced by what ``edit`` returns; None leaves them unchanged. Raises UserError where only
        the hooks of a bridge can read this place (side ``"inner"``).
        """
        module = self.module(model)
        if self.side == "in":
            return module.register_forward_pre_hook(_before(edit), with_kwargs=True)
        if self.side == "out":
            return module.register_forward_hook(_after(edit))
        raise UserError(f"{self.hook_name} is neither the input nor the output of a module; choose another hook point")

    def module(self, model: nn.Module) -> nn.Module:
        """The module of ``model``, a bridge or a plain model, that runs at ``path``; UserError where there is none."""
        module = underlying(model)
        for name in self.path.split("."):
            # A component of a bridge keeps the model's own module inside; that one's children are the ones that run.
            module = _inside(module)._modules.get(name)
            if module is None:
                raise UserError(f"the model has no module {self.path!r}; pass the model that has {self.hook_name}")
        return module

    def width(self, model: nn.Module) -> int | None:
        """``d_in`` at this place; None where neither the module nor the model's configuration shows it."""
        module = _inside(self.module(model))
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            return module.in_features if self.side == "in" else module.out_features
        if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):  # GPT-2's linear map, stored transposed
            return weight.shape[0 if self.side == "in" else 1]
        return width(model)


def locate(model: nn.Module, name: str) -> Site:
    """The place in ``model`` that a TransformerLens hook name, or the path of a Hugging Face module (its output),
    stands for.

    ``model`` is a bridge or a plain Hugging Face model. UserError with near matches where it has no such place.
    Every place can be read; ask :func:`check_replaceable` before writing to one.
    """
    if underlying(model) is model:
        return _on_plain(model, name)
    bridge = cast("TransformerBridge", model)
    hook_name, canonical = resolve(bridge, name)
    side = {"hook_out": "out", "hook_in": "in"}.get(canonical.rpartition(".")[2], "inner")
    if bridge.compatibility_mode and _point(canonical) in _PROJECTION_INPUTS:
        side = "inner"  # it computes the sublayers itself, past their modules
    return Site(hook_name, module_path(bridge, canonical), side, canonical)


def check_replaceable(site: Site) -> Site:
    """Return ``site`` if the later layers see only what is put there; raise UserError otherwise.

    That holds for the output of a module, the input of a block, and the input of the linear map that ends a sublayer
    (``attn.hook_z``, ``mlp.hook_post``). It does not hold for the middle of the residual stream, for example, which
    also bypasses the module whose input a hook could replace.
    """
    whole = _point(site.canonical or site.hook_name) in _BLOCK_INPUTS | _PROJECTION_INPUTS
    if site.side == "out" or (site.side == "in" and whole):
        return site
    raise UserError(
        f"{site.hook_name} does not reach the later layers through one module alone, so it cannot be "
        "replaced; use a residual stream (hook_resid_pre, hook_resid_post), attn.hook_z, mlp.hook_post, or an "
        "attention or MLP output"
    )


def underlying(model: nn.Module) -> nn.Module:
    """The module whose ``forward`` maps tokens to logits: a bridge's inner model, or the model itself."""
    return getattr(model, "original_model", model)


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: the device of its first parameter."""
    return next(underlying(model).parameters()).device


def width(model: nn.Module) -> int | None:
    """``d_model``, if the model's configuration has it."""
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


def _before(edit: Edit) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = edit(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return hook


def _after(edit: Edit) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return edit(output)
        new = edit(output[0])
        return None if new is None else (new, *output[1:])

    return hook


def _inside(module: nn.Module) -> nn.Module:
    """The model's own module inside a component of a bridge; any other module itself."""
    return module.get_submodule(WRAPPED) if WRAPPED in module._modules else module


def _point(name: str) -> str:
    """The part of a hook name after the block's number."""
    match = re.fullmatch(r"blocks\.\d+\.([\w.]+)", name)
    return match[1] if match else ""


def _on_plain(model: nn.Module, hook_name: str) -> Site:
    """The site of a hook name in a model that no bridge has read."""
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", hook_name)
    if match is None:
        return Site(hook_name, _path(model, hook_name), "out")
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
    name = next((name for name in names if name == "" or name in children), None)
    if name is None:
        raise UserError(f"{hook_name}: none of {', '.join(children)} is that sublayer")
    path = f"{prefix}.{index}.{name}".rstrip(".")
    return Site(hook_name, _projection(model, path, hook_name) if point in _PROJECTION_INPUTS else path, side)


def _projection(model: nn.Module, path: str, hook_name: str) -> str:
    """The path of the linear map that ends the sublayer at ``path``."""
    inside = model.get_submodule(path).named_modules()
    found = [name for name, _ in inside if name.rpartition(".")[2] in _PROJECTIONS]
    if len(found) != 1:  # a mixture of experts has several
        raise UserError(f"{hook_name}: {path} does not end in one linear map that saelab knows; use its output instead")
    return f"{path}.{found[0]}"


def _path(model: nn.Module, path: str) -> str:
    found = below_base(model, path, dict(model.named_modules()))
    if found is None:
        prefix, layers = blocks(model)
        known = [f"blocks.{i}.{point}" for i in range(len(layers)) for point in _POINTS]
        known += [f"{prefix}.{i}" for i in range(len(layers))]
        raise UserError(f"the model has no hook point {path!r}: {near_matches(path, known)}")
    return found
