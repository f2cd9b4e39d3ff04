"""Places in a running model where activations are read or replaced: one side of one module.

A name means the same activations on a plain Hugging Face model and on a TransformerLens bridge. On both it is resolved
by the structure of the model's blocks; a bridge adds the hook points that only TransformerLens shows.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from saelab.errors import UserError, near_matches
from saelab.lm.hook_names import below_base, canonical_name, layer_of, module_path, short
from saelab.lm.norms import BARE, bare_norm, without_gain
from saelab.lm.residual import Place, sublayers
from saelab.lm.structure import (
    attention,
    blocks,
    child,
    children,
    first_map,
    inside,
    is_mixture,
    last_map,
    mlp,
    modules,
    multiplier,
    opened,
    projection,
    text_config,
    underlying,
    width,
)
from saelab.lm.tensor_parallel import check_whole

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Points of a block, and what they are of. Inputs of the block and of the linear maps that end a sublayer reach the
# later layers through their module alone, so that replacing them there is complete; the middle of the residual stream
# also bypasses the module that reads it.
_STREAM = {"hook_resid_pre": "in", "hook_in": "in", "hook_resid_post": "out", "hook_out": "out"}
_ADDED = {"hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out", "hook_resid_mid": "resid_mid"}
_SUBLAYERS = {"attn.hook_out": "attn_out", "mlp.hook_out": "mlp_out"}
_LAST = {"attn.hook_z": "attn", "attn.o.hook_in": "attn", "mlp.hook_post": "mlp", "mlp.out.hook_in": "mlp"}
_PROJECTED = {"attn.hook_q": "q", "attn.hook_k": "k", "attn.hook_v": "v"}
_READS = {"mlp.hook_in": "mlp", "attn.hook_in": "attn"}  # what a sublayer reads, behind its norm
_PRE = "mlp.hook_pre"
POINTS = (*_STREAM, *_ADDED, *_SUBLAYERS, *_LAST, *_PROJECTED, *_READS, _PRE)
_PARTIAL = {"hook_resid_mid"}

Edit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Site:
    """One side of one module of a model, or some columns of it, wherever the model is loaded."""

    hook_name: str  # TransformerLens name as asked for, e.g. blocks.9.hook_resid_post
    path: str  # of the module in the Hugging Face model, e.g. model.layers.9
    side: str  # "out" or "in": output or first input of that module; "inner" where only a bridge can read it
    canonical: str = ""  # TransformerBridge's own name, e.g. blocks.9.hook_out; "" where it has none
    columns: tuple[int, ...] | None = None  # of the module's output that are meant, e.g. the queries of a fused map
    scale: float = 1.0  # the model multiplies what the module gives by it
    bare: bool = False  # of a norm, before its gain: to be read only

    @property
    def place(self) -> tuple[Any, ...]:
        """What two sites have in common that mean the same activations by different names."""
        return self.path, self.side, self.columns, self.scale, self.bare

    @property
    def whole(self) -> bool:
        """Whether the activations are a side of a module just as it is."""
        return self.side != "inner" and self.columns is None and self.scale == 1.0 and not self.bare

    def register(self, model: nn.Module, edit: Edit) -> AbstractContextManager[Any]:
        """Call ``edit`` with the activations ``[batch, position, d_in]`` at this place of ``model`` inside the ``with``
        block.

        The activations are replaced by what ``edit`` returns; None leaves them unchanged. Raises UserError where only
        the hooks of a bridge can read this place (side ``"inner"``).
        """
        model = opened(model)
        # TransformerLens passes over the output of a block that is a list (GPT-1).
        is_output = _STREAM.get(_point(self.hook_name)) == "out"
        if self.canonical and underlying(model) is not model and not is_output:
            return _on_hook_point(cast("TransformerBridge", model).hook_dict[self.canonical], edit)
        if self.side == "inner":
            raise UserError(
                f"{self.hook_name} is neither the input nor the output of a module; choose another hook point"
            )
        return _on_module(self, model, edit)

    def module(self, model: nn.Module) -> nn.Module:
        """The module of ``model``, a bridge or a plain model, that runs at ``path``; UserError where there is none."""
        module = underlying(model)
        for name in self.path.split("."):
            # A component of a bridge keeps the model's own module inside; that one's children are the ones that run.
            found = children(module).get(name)
            if found is None:
                raise UserError(f"the model has no module {self.path!r}; pass the model that has {self.hook_name}")
            module = found
        return module

    def width(self, model: nn.Module) -> int | None:
        """``d_in`` at this place; None where neither the module nor the model's configuration shows it."""
        if self.columns is not None:
            return len(self.columns)
        module = inside(self.module(model))
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            return module.in_features if self.side == "in" else module.out_features
        if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):  # GPT-2's linear map, stored transposed
            return weight.shape[0 if self.side == "in" else 1]
        if self.bare or _point(self.hook_name) in {*_STREAM, *_ADDED}:
            return width(model)
        return None


def locate(model: nn.Module, name: str) -> Site:
    """The place in ``model`` that a TransformerLens hook name, or the path of a Hugging Face module (its output),
    stands for.

    ``model`` is a bridge or a plain Hugging Face model; a place is the same on both. UserError with near matches where
    the model has no such place, or the reason why a place cannot be read. Every place can be read; ask
    :func:`check_replaceable` before writing to one.
    """
    model = opened(model)
    site = _find(model, name)
    if site is None:
        raise UserError(f"the model has no hook point {name!r}: {near_matches(name, _existing(model, name))}")
    check_whole(model, name, site.path, site.side)
    return site


def _find(model: nn.Module, name: str) -> Site | None:
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", name)
    bridge = cast("TransformerBridge", model) if underlying(model) is not model else None
    canonical = None if bridge is None else canonical_name(bridge, name)
    if match is not None and match[2] == BARE and (norm := bare_norm(model, int(match[1]))):
        return Site(name, norm, "out", bare=True)
    if match is not None and match[2] in POINTS:
        site = _structural(model, name, int(match[1]), match[2])
        # Some places have no name in TransformerLens.
        return site if bridge is None or canonical is None else _on_bridge(bridge, name, canonical, site)
    if bridge is not None and canonical is not None:
        return _on_bridge(bridge, name, canonical, None)
    return _by_path(model, name) if match is None else None


def check_replaceable(site: Site) -> Site:
    """Return ``site`` if the later layers see only what is put there; raise UserError otherwise.

    That holds for the output of a module, the input of a block, and the input of the linear map that ends a sublayer
    (``attn.hook_z``, ``mlp.hook_post``). It does not hold for the middle of the residual stream, for example, which
    also bypasses the module whose input a hook could replace.
    """
    if replaceable(site):
        return site
    raise UserError(
        f"{site.hook_name} does not reach the later layers through one module alone, so it cannot be "
        "replaced; use a residual stream (hook_resid_pre, hook_resid_post), attn.hook_z, mlp.hook_post, or an "
        "attention or MLP output"
    )


def replaceable(site: Site) -> bool:
    """Whether :func:`check_replaceable` lets the site pass."""
    point = _point(site.hook_name) or _point(site.canonical)
    whole = point in {*_STREAM, *_LAST, *_PROJECTED, _PRE}
    return (site.side == "out" or (site.side == "in" and whole)) and point not in _PARTIAL and not site.bare


@contextmanager
def _on_hook_point(point: Any, edit: Edit) -> Iterator[None]:
    """``edit`` at a hook point of a bridge; heads, where the bridge shows them, side by side."""

    def hook(x: Tensor, hook: Any) -> Tensor | None:
        new = edit(x.flatten(2))
        return None if new is None else new.reshape(*new.shape[:2], *x.shape[2:])

    point.add_hook(hook)
    handle = point.fwd_hooks[-1]
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def _on_module(site: Site, model: nn.Module, edit: Edit) -> Iterator[None]:
    """``edit`` at a side of a module, or at what the model makes of it."""
    with ExitStack() as stack:
        shapes: list[torch.Size] = []

        def change(full: Tensor) -> Tensor | None:
            # OPT runs its MLP on rows; the block knows how many belong to a text.
            x = full.reshape(*shapes[-1][:2], full.shape[-1]) if full.ndim == 2 and shapes else full
            new = edit(without_gain(module, x) if site.bare else _part(site, x))
            return None if new is None else _put_back(site, x, new).reshape(-1, *full.shape[1:])

        index = layer_of(site.hook_name)
        if index is not None and not site.path.endswith(f".{index}"):
            block = Site("", f"{blocks(model)[0]}.{index}", "in").module(model)
            note = _before(lambda x: shapes.append(x.shape))
            stack.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        module = site.module(model)
        if site.side == "in":
            stack.enter_context(module.register_forward_pre_hook(_before(change), with_kwargs=True))
        else:
            stack.enter_context(module.register_forward_hook(_after(change)))
        yield


def _part(site: Site, x: Tensor) -> Tensor:
    x = x if site.columns is None else x[..., _index(site.columns, x.device)]
    return x if site.scale == 1.0 else x * site.scale


def _put_back(site: Site, x: Tensor, new: Tensor) -> Tensor:
    new = new if site.scale == 1.0 else new / site.scale
    if site.columns is None:
        return new
    x = x if x.shape[0] == new.shape[0] else x.expand(new.shape[0], *x.shape[1:])
    return x.index_copy(-1, _index(site.columns, x.device), new)


def _index(columns: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(columns, device=device)


def _before(edit: Edit) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = edit(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return hook


def _after(edit: Edit) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, tuple | list):
            return edit(output)
        new = edit(output[0])
        return None if new is None else type(output)((new, *output[1:]))

    return hook


def _point(name: str) -> str:
    """The part of a hook name after the block's number."""
    match = re.fullmatch(r"blocks\.\d+\.([\w.]+)", name)
    return match[1] if match else ""


def _on_bridge(bridge: TransformerBridge, name: str, canonical: str, site: Site | None) -> Site:
    """The site of a name that TransformerLens knows: read on the plain model where its structure shows it."""
    own = name if _point(name) in POINTS else short(canonical)
    # In compatibility mode a bridge computes the sublayers itself, past their modules.
    if bridge.compatibility_mode and _point(name) in {*_LAST, *_PROJECTED, _PRE}:
        site = None
    if site is None:
        side = "inner" if _point(name) in POINTS else _side(canonical)
        return Site(own, module_path(bridge, canonical), side, canonical)
    if _point(name) in _PARTIAL and module_path(bridge, canonical) != site.path:
        canonical = ""  # where norms follow the sublayers, TransformerLens shows another tensor by that name
    if site.scale != 1.0 and _side(canonical) == "out":
        canonical = ""  # the module's own output, which the block multiplies afterwards
    return replace(site, hook_name=name, canonical=canonical)


def _side(canonical: str) -> str:
    return {"hook_out": "out", "hook_in": "in"}.get(canonical.rpartition(".")[2], "inner")


def _structural(model: nn.Module, name: str, index: int, point: str) -> Site | None:
    """The site of a block's point by the structure of the model; None where that does not show it.

    UserError with the reason where the model has no such point, or nothing there that deserves the name.
    """
    prefix, layers = blocks(model)
    if index >= len(layers):
        raise UserError(f"{name}: the model has {len(layers)} blocks, 0 to {len(layers) - 1}")
    block, path = layers[index], f"{prefix}.{index}"
    if point in _STREAM:
        return Site(name, path, _STREAM[point])
    if point in _ADDED or point in _SUBLAYERS:
        return _sublayer(model, name, index, point)
    sublayer = mlp(block) if point.startswith("mlp") else attention(block)
    if sublayer is None:
        raise UserError(
            f"{name}: this block has no {'MLP' if point.startswith('mlp') else 'attention'}, only "
            f"{', '.join(children(block))}; use hook_resid_pre or hook_resid_post"
        )
    path, module = f"{path}.{sublayer}".rstrip("."), child(block, sublayer)
    if point.startswith("mlp") and is_mixture(block):
        raise UserError(f"{name}: a mixture of experts has no one layer of neurons; use hook_mlp_out")
    if point in _READS:
        return Site(name, path, "in")
    if point in _LAST:
        last = last_map(module)
        return None if last is None else Site(name, f"{path}.{last}", "in")
    if point == _PRE:
        first = first_map(module)
        return None if first is None else Site(name, f"{path}.{first[0]}", first[1], scale=multiplier(model, point))
    return _projected(model, name, path, module, _PROJECTED[point])


def _projected(model: nn.Module, name: str, path: str, module: nn.Module, which: str) -> Site | None:
    if getattr(text_config(model), "kv_lora_rank", None):
        raise UserError(f"{name}: latent attention makes queries, keys and values of two parts each; use attn.hook_z")
    found = projection(model, module, which)
    if found is not None and found[1] == ():
        raise UserError(f"{name}: {path}.{found[0]} gives more than that (a gate, for example); use attn.hook_z")
    if found is None:
        return None
    scale = multiplier(model, f"attn.hook_{which}")
    return Site(name, f"{path}.{found[0]}", "out", columns=found[1], scale=scale)


def _sublayer(model: nn.Module, name: str, index: int, point: str) -> Site | None:
    """The site of what a sublayer adds to the residual stream, and of the stream between the two."""
    prefix, layers = blocks(model)
    added = sublayers(model, index)
    if added is None:
        return None
    found: Place | None = getattr(added, _ADDED.get(point) or _SUBLAYERS[point])
    if point in _SUBLAYERS:
        # The sublayer's own output, before a norm or a multiplier, but without a residual stream in it.
        own = mlp(layers[index]) if point.startswith("mlp") else attention(layers[index])
        if own and (found is None or not f"{found.path}.".startswith(f"{own}.")):
            found = Place(own, "out")
        found = found and Place(found.path, found.side)
    if found is not None:
        return Site(name, f"{prefix}.{index}.{found.path}", found.side, scale=found.scale)
    block = layers[index]
    if point in _PARTIAL and added.attn_out and added.mlp_out:
        reason = "attention and MLP of this block read the same input, so there is no stream between them"
    elif attention(block) is None or mlp(block) is None:
        reason = f"this block has no attention with an MLP after it, only {', '.join(children(block))}"
    elif underlying(model) is model:
        reason = "no module of this block shows it"
    else:
        return None
    raise UserError(f"{name}: {reason}; use hook_resid_pre or hook_resid_post")


def _by_path(model: nn.Module, name: str) -> Site | None:
    """The site of a module's output by its Hugging Face path, which may begin at the base model.

    A point of a block gets its TransformerLens name.
    """
    known = dict(modules(model))
    path = below_base(underlying(model), name, known)
    if path is None or not path:
        return None
    prefix, layers = blocks(model)
    match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)(\..+)?", path)
    if match is not None and int(match[1]) < len(layers):
        index, block = int(match[1]), layers[int(match[1])]
        points = ["hook_resid_post"] if match[2] is None else []
        points += ["hook_attn_out"] if match[2] == f".{attention(block)}" else []
        points += ["hook_mlp_out"] if match[2] == f".{mlp(block)}" else []
        for point in points:
            site = locate(model, f"blocks.{index}.{point}")
            if (site.path, site.side) == (path, "out") and site.whole:
                return site
    return Site(name, path, "out")


def _existing(model: nn.Module, name: str) -> list[str]:
    """The names closest to one that does not exist, all of places that the model has."""
    prefix, layers = blocks(model)
    known = [f"blocks.{i}.{point}" for i in range(len(layers)) for point in POINTS]
    known += [f"{prefix}.{i}" for i in range(len(layers))]
    if underlying(model) is not model:
        known += list(cast("TransformerBridge", model).hook_dict)
    close = difflib.get_close_matches(name, sorted(set(known)), n=12, cutoff=0.4) or known[:12]
    return [other for other in close if other != name and _exists(model, other)]


def _exists(model: nn.Module, name: str) -> bool:
    try:
        return _find(model, name) is not None
    except UserError:
        return False
