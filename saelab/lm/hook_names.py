"""Names of hook points: TransformerLens names, old or canonical, and Hugging Face module paths."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# What users of TransformerLens call the canonical points of a block.
_ALIASES = {"hook_in": "hook_resid_pre", "hook_out": "hook_resid_post", "ln2.hook_in": "hook_resid_mid"}
# Last parts of hook names that stand for the first input, or the output, of the module the hook belongs to.
_INPUTS = {"hook_in", "hook_resid_pre", "hook_resid_mid", "hook_z", "hook_post"}
_OUTPUTS = {"hook_out", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_embed", "hook_pos_embed"}
_OUTPUTS |= {"hook_q", "hook_k", "hook_v", "hook_pre", "hook_pre_linear"}


def canonical_name(model: TransformerBridge, name: str) -> str | None:
    """The bridge's own name of a hook point, ``blocks.9.hook_out`` for ``blocks.9.hook_resid_post``; None for none."""
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


def side_of(hook_name: str) -> str:
    """Whether a hook name means the output (``"out"``) or first input (``"in"``) of its module, ``"inner"`` for
    neither.

    A name without ``hook_`` is a module path, which means the output. For manifests that do not record the side.
    """
    last = hook_name.rpartition(".")[2]
    if last in _INPUTS:
        return "in"
    return "out" if last in _OUTPUTS or not last.startswith("hook_") else "inner"


def below_base(model: nn.Module, path: str, known: Container[str]) -> str | None:
    """The full path of ``path``, if that is in ``known``; ``path`` may begin at the model without its head."""
    base = getattr(model, "base_model_prefix", "")
    return next((p for p in (path, f"{base}.{path}") if p in known), None)


def short(canonical: str) -> str:
    """The familiar name of a block's residual stream, other names unchanged."""
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", canonical)
    if match and match[2] in _ALIASES:
        return f"{match[1]}.{_ALIASES[match[2]]}"
    return canonical


def layer_of(hook_name: str) -> int | None:
    """The block a hook name belongs to, read from the first number in it."""
    match = re.search(r"\.(\d+)(\.|$)", hook_name)
    return int(match[1]) if match else None


def any_layer(hook_name: str) -> str:
    """The hook name with ``*`` for the number that :func:`layer_of` reads; itself where it has none."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", hook_name, count=1)


def module_path(model: TransformerBridge, canonical: str) -> str:
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
