"""Hook points: TransformerLens names, old or canonical, and the Hugging Face modules they stand for."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from saelab.errors import UserError, near_matches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# What users of TransformerLens call the canonical points of a block.
_ALIASES = {"hook_in": "hook_resid_pre", "hook_out": "hook_resid_post", "ln2.hook_in": "hook_resid_mid"}


@dataclass(frozen=True)
class HookSite:
    """One point in a model where activations are read or changed."""

    hook_name: str  # TransformerLens name as asked for, e.g. blocks.9.hook_resid_post
    canonical: str  # TransformerBridge's own name, e.g. blocks.9.hook_out
    module: str  # Hugging Face module path, e.g. model.layers.9
    side: str  # "out" or "in": output or first input of that module; "inner" where it is neither


def find_hook(model: TransformerBridge, name: str) -> HookSite:
    """Look up a TransformerLens hook name (old or canonical) or a Hugging Face module path (its output).

    A path may begin at the base model, as sparsify's do: ``layers.9`` is ``model.layers.9``.
    UserError with near matches where the model has no such point.
    """
    canonical = _canonical(model, name)
    if canonical is None:
        sites = {_module(model, hook): hook for hook in model.hook_dict if hook.endswith(".hook_out")}
        path = below_base(model.original_model, name, sites)
        if path is None:
            known = {*map(short, model.hook_dict), *model.hook_dict, *sites}
            raise UserError(f"the model has no hook point {name!r}: {near_matches(name, sorted(known))}")
        canonical = sites[path]
        name = short(canonical)
    ends = canonical.rsplit(".", 1)[-1]
    side = {"hook_out": "out", "hook_in": "in"}.get(ends, "inner")
    return HookSite(name, canonical, _module(model, canonical), side)


def below_base(model: nn.Module, path: str, known: Container[str]) -> str | None:
    """``path`` as it stands in the whole model, if that is in ``known``; it may begin at the model without its head."""
    base = getattr(model, "base_model_prefix", "")
    return next((p for p in (path, f"{base}.{path}") if p in known), None)


def short(canonical: str) -> str:
    """The familiar name of a block's residual stream, other names unchanged."""
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", canonical)
    if match and match[2] in _ALIASES:
        return f"{match[1]}.{_ALIASES[match[2]]}"
    return canonical


def _canonical(model: TransformerBridge, name: str) -> str | None:
    if name in model.hook_dict:
        return str(model.hook_dict[name].name)
    point: Any = model
    for part in name.split("."):
        try:
            point = point[int(part)] if part.isdigit() else getattr(point, part)
        except (AttributeError, IndexError, TypeError):
            return None
    hook = str(getattr(point, "name", ""))
    return hook if hook in model.hook_dict and model.hook_dict[hook] is point else None


def _module(model: TransformerBridge, canonical: str) -> str:
    """Hugging Face path of the component a canonical hook belongs to."""
    component: Any = model
    path: list[str] = []
    for part in canonical.split(".")[:-1]:
        component = component[int(part)] if part.isdigit() else getattr(component, part)
        # A block names its full path, everything below a block is named relative to its parent.
        if isinstance(component, nn.ModuleList):
            continue
        name = getattr(component, "name", None)
        if name:
            path.append(str(name))
    return ".".join(path)
