"""Shorten the key-value cache of a generation, so that another text with the same beginning can use it."""

from __future__ import annotations

from typing import Any


def keep_first(cache: Any, held: int, count: int) -> Any | None:
    """The cache of ``held`` tokens cut to its first ``count``; None where that cannot be done and nothing can be kept.

    Layers that hold keys and values of every token are cut. Those with a window have forgotten what a shorter text
    would need, so they serve a longer text only. States of recurrent layers, which may not be continued by several
    tokens at once, static and quantised caches are not kept at all.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None)
    if not layers or not 0 < count <= held:
        return None
    kinds = {type(layer) for layer in layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    if count == held:
        return cache
    if kinds != {DynamicLayer}:
        return None
    for layer in layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :count, :], layer.values[..., :count, :]
    return cache
