"""Finding in a language model the point that a cache was harvested at, and making sure that it is the same model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation.splice import Site, edited

AGREEMENT = 0.02  # of the norm: stored values are rounded to the cache's dtype, attention kernels sum in another order


def locate(model: Any, cache: ActivationCache) -> tuple[nn.Module, Site]:
    """The plain Hugging Face model behind ``model`` and the cache's point in it."""
    hook_name, path = cache.manifest.hook_name, cache.manifest.hf_hook_name
    side = "out"
    if hasattr(model, "original_model"):  # a TransformerBridge
        from saelab.lm import find_hook
        from saelab.lm.unwrapped import plain_model

        found = find_hook(model, hook_name)
        side, path, model = found.side, found.module, plain_model(model)
        if model is None:
            raise UserError(
                "this bridge's weights fit no plain model to splice into; load it without weight processing"
            )
    whole_input = hook_name.endswith("hook_resid_pre") or side == "out"
    if side == "inner" or not whole_input:
        raise UserError(
            f"{hook_name} is not a place where a module's output can be replaced, so cross-entropy with the SAE "
            "spliced in is not defined; pass --lm-tokens 0, or use a residual stream, attention or MLP output"
        )
    try:
        return model, Site(model.get_submodule(path), side)
    except AttributeError as error:
        raise UserError(
            f"the model has no module {path!r}, where the cache was harvested; pass its own model"
        ) from error


@torch.no_grad()
def check_same_model(model: nn.Module, site: Site, cache: ActivationCache, tokens: Tensor, rows: Tensor) -> None:
    """Refuse a model that does not produce what the cache holds, judged on one context."""
    seen: list[Tensor] = []

    def look(acts: Tensor) -> Tensor:
        seen.append(acts[0])
        return acts

    with edited(site, look):
        model(input_ids=tokens[None], use_cache=False)
    stored = cache.read(rows[rows >= 0]).acts
    if seen[0].shape[-1] != stored.shape[1]:
        raise UserError(
            f"the model's activations have width {seen[0].shape[-1]}, the cache's {stored.shape[1]}; pass its own model"
        )
    live = seen[0][rows >= 0].float()
    if not (live - stored).norm() <= AGREEMENT * stored.norm():
        raise UserError(
            f"{cache.path} was harvested from another model than the one given "
            f"({cache.manifest.model or 'unnamed'} at {cache.hook_name}); pass that model"
        )
