"""The first rows of a pass, for everything that looks at a sample of a cache."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from saelab.data.cache.batches import Batch
from saelab.data.cache.reader import ActivationCache, Split
from saelab.errors import UserError


def head(
    cache: ActivationCache,
    n: int | None = None,
    batch_size: int = 4096,
    *,
    split: Split = "all",
    seed: int | None = None,
    grads: bool = False,
) -> Generator[Batch]:
    """The first ``n`` rows of a split (all of them by default, or where it holds fewer), in batches.

    ``seed=None`` is corpus order; see :meth:`ActivationCache.batches`. Reading stops with the last row asked for.
    """
    rows = cache.n_split(split)
    left = rows if n is None else min(n, rows)
    if left < 1:
        raise UserError(f"no row of the {split} split of {cache.path} is to be read: it holds {rows}, n={n} are wanted")
    with closing(cache.batches(min(batch_size, left), split=split, seed=seed, grads=grads)) as batches:
        for batch in batches:
            yield Batch(*(None if column is None else column[:left] for column in batch))  # pyright: ignore[reportArgumentType]
            left -= len(batch.acts)
            if left <= 0:
                return
