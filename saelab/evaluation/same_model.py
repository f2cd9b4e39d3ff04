"""Find the place in a language model at which a cache was harvested, and check that it is the same model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saelab.data.cache import ActivationCache
from saelab.data.cache.manifest import Manifest
from saelab.devices import DTYPES
from saelab.errors import UserError
from saelab.lm.fingerprint import coarser, is_quantised, row_gaps, same_activations
from saelab.lm.hook_names import layer_of, side_of
from saelab.lm.offload import device_of
from saelab.lm.record import ModelRecord, differences
from saelab.lm.route import Route
from saelab.lm.sites import Site, check_replaceable, locate
from saelab.lm.structure import opened, underlying
from saelab.lm.unwrapped import plain_model


def plain_site(model: Any, cache: ActivationCache) -> tuple[nn.Module, Site]:
    """The plain Hugging Face model behind ``model``, and the cache's place in it.

    UserError where the model has no such place, or one whose replacement the later layers would not see in full.
    """
    manifest = cache.manifest
    model = opened(model)
    if underlying(model) is model:
        return model, _splice_site(_recorded(model, manifest))
    site, plain = locate(model, manifest.hook_name), plain_model(model)
    if plain is None:
        raise UserError("this bridge's weights fit no plain model to splice into; load it without weight processing")
    return plain, _splice_site(site)


def plain_route(model: Any, cache: ActivationCache) -> tuple[nn.Module, Route]:
    """The plain model, and the places of an SAE on ``cache``: that of the cache, and that of its target."""
    plain, write = plain_site(model, cache.goal)
    return plain, Route(write if cache.target is None else reading_site(model, plain, cache), write)


def reading_site(model: Any, plain: nn.Module, cache: ActivationCache) -> Site:
    """The cache's place in the plain model, where activations are only read."""
    manifest, model = cache.manifest, opened(model)
    return _recorded(plain, manifest) if underlying(model) is model else locate(model, manifest.hook_name)


def _recorded(model: nn.Module, manifest: Manifest) -> Site:
    """The place that the manifest names, found by its hook name; by its path where the name is not of this model's."""
    path = manifest.hf_hook_name
    if manifest.hook_name:
        try:
            return locate(model, manifest.hook_name)
        except UserError:
            if path not in dict(model.named_modules()):
                raise
    if path in dict(model.named_modules()):
        return Site(manifest.hook_name, path, manifest.side or side_of(manifest.hook_name or path))
    return locate(model, manifest.hook_name or path)


def _splice_site(site: Site) -> Site:
    try:
        return check_replaceable(site)
    except UserError as error:
        raise UserError(f"cross-entropy with the SAE spliced in is undefined: {error}; or pass --lm-tokens 0") from None


@torch.no_grad()
def check_same_model(
    model: nn.Module, site: Site, cache: ActivationCache, tokens: Tensor, rows: Tensor, any_weights: bool = False
) -> None:
    """Refuse a model that does not produce what the cache holds, judged on every stored row of one context.

    With ``any_weights`` only the width counts.

    ``tokens`` and ``rows`` are as :meth:`ActivationCache.contexts` gives them; ``model`` is on any device. The weights
    are compared too, because those above the hook point do not show in the activations.
    """
    seen: list[Tensor] = []  # clones, because later modules may write into them
    with site.register(model, lambda acts: seen.append(acts[0].clone())):
        model(input_ids=tokens[None].to(device_of(model)), use_cache=False)
    live, stored = seen[0].cpu(), cache.read(rows[rows >= 0]).acts
    if live.shape[-1] != stored.shape[1]:
        raise UserError(
            f"the model's activations have width {live.shape[-1]}, the cache's {stored.shape[1]}; pass its own model"
        )
    if any_weights:
        return
    record, live = ModelRecord.from_manifest(cache.manifest), live[rows >= 0]
    # Layers that quantise their inputs as they run do it by the largest of a pass, which leaves most values few bits.
    runs_in = torch.float8_e4m3fn if is_quantised(model) else live.dtype
    if record.has_weights_of(model) and _same(live, stored, record, cache, runs_in):
        return
    gap = float(row_gaps(live, stored).median())
    raise UserError(
        f"{cache.path} was harvested from another model than the one given ({cache.manifest.model or 'unnamed'} at "
        f"{cache.hook_name}; half of the rows differ by more than {gap:.2g} of their norm): "
        f"{differences(model, record)}; pass that model"
    )


def _same(live: Tensor, stored: Tensor, record: ModelRecord, cache: ActivationCache, runs_in: torch.dtype) -> bool:
    layer = layer_of(cache.hook_name or cache.manifest.hf_hook_name)
    # A cache that does not say in which precision its model ran may have been harvested in bfloat16.
    dtype = coarser(runs_in, DTYPES.get(record.dtype, torch.bfloat16))
    written = DTYPES[cache.manifest.dtype]
    return same_activations(live, stored, 1 if layer is None else layer + 1, dtype, written)
