"""From shards to batches: windows are loaded one ahead, batches cut from them two ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache.order import Order, Window, read_ahead
from saelab.data.cache.shards import Shards
from saelab.errors import UserError


class Batch(NamedTuple):
    """Rows of a cache, in raw units."""

    acts: Float[Tensor, "n d_in"]  # float32
    grads: Float[Tensor, "n d_in"] | None  # float32: gradient of the summed LM loss at the hook
    tokens: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]  # row numbers in the cache


def stream(
    shards: Shards, order: Order, names: Sequence[str], batch_size: int, start: int, end: int
) -> Iterator[Batch]:
    """Rows ``start : end`` of a pass, as batches."""
    loaded = ((window, _load(shards, window, names)) for window in order.windows(start))
    cut = _cut(read_ahead(loaded, 1), batch_size, end - start)
    yield from read_ahead((make_batch(shards, parts) for parts in cut), 2)


def _load(shards: Shards, window: Window, names: Sequence[str]) -> dict[str, Tensor]:
    """The window's rows in corpus order; views of the file when they lie in one piece."""
    parts = shards.pieces(window.spans, names)
    held = {name: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for name, pieces in parts.items()}
    held["rows"] = window.rows()
    return held


def _cut(
    windows: Iterator[tuple[Window, dict[str, Tensor]]], batch_size: int, remaining: int
) -> Iterator[list[dict[str, Tensor]]]:
    """The parts of each batch; a batch may span windows."""
    parts: list[dict[str, Tensor]] = []
    missing = min(batch_size, remaining)
    for window, held in windows:
        at = window.skip
        while at < window.length and remaining > 0:
            take = min(missing, window.length - at)
            pick = window.picks(at, at + take)
            parts.append({name: tensor[pick] for name, tensor in held.items()})
            at, missing, remaining = at + take, missing - take, remaining - take
            if missing == 0:
                yield parts
                parts, missing = [], min(batch_size, remaining)


def make_batch(shards: Shards, parts: list[dict[str, Tensor]]) -> Batch:
    """One batch in raw units; UserError where an activation is not finite."""
    held = parts[0]
    if len(parts) > 1:
        held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    acts, rows = held["acts"].float(), held["rows"].clone()
    _check_finite(shards, acts, rows)
    grads = None
    if "grads" in held:
        grads = held["grads"].float() / (shards.manifest.grad_scale or 1.0)
    return Batch(acts, grads, held["tokens"].long(), rows)


def _check_finite(shards: Shards, acts: Tensor, rows: Tensor) -> None:
    # The sum is cheap, and finite for all sane data; only a suspicious batch is searched.
    if torch.isfinite(acts.sum()):
        return
    bad = (~acts.isfinite().all(1)).nonzero()
    if len(bad):
        file, local = shards.name(int(rows[bad[0, 0]]))
        raise UserError(
            f"{shards.folder.url}/{file} has a non-finite activation in row {local}; harvest the cache again"
        )
