"""Metrics that need no language model: reconstruction, sparsity and firing on the rows of a cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.data.cache.reader import Split
from saelab.errors import UserError
from saelab.metrics import FiringCounts, ReconstructionSums
from saelab.sae import SAE
from saelab.training.config import check_target

Progress = Callable[[str, int, int], None]  # what, done, total


def context_of_rows(cache: ActivationCache, split: Split, max_rows: int | None = None) -> Tensor:
    """For each row of a split, in corpus order, the number of its context counted from the split's start."""
    counts, total = [], 0
    for _, rows in cache.contexts(split):
        counts.append(int((rows >= 0).sum()))
        total += counts[-1]
        if max_rows is not None and total >= max_rows:
            break
    return torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64))[:max_rows]


def document_of_rows(cache: ActivationCache, split: Split, max_rows: int | None = None) -> Tensor:
    """For each row of a split, in corpus order, the number of its document counted from the split's first one.

    Tokens of one document resemble each other, so intervals resample documents: contexts of one document would make
    them several times too narrow.
    """
    return cache.documents(split, max_rows).unique(return_inverse=True)[1]


def check_pair(sae: SAE, cache: ActivationCache, split: Split) -> None:
    """Refuse an SAE and a cache that do not belong together, or a split without rows."""
    if sae.d_in != cache.d_in:
        raise UserError(
            f"the SAE reads width d_in={sae.d_in} but the cache {cache.path} holds width {cache.d_in}; "
            "use the cache it was trained on"
        )
    check_target(sae, cache)
    if cache.n_split(split) == 0:
        raise UserError(f"the {split} split of {cache.path} is empty; harvest with a held-out share above 0")


@torch.no_grad()
def reconstruction(
    sae: SAE,
    cache: ActivationCache,
    *,
    split: Split = "held_out",
    max_tokens: int | None = None,
    batch_size: int = 4096,
    grads: bool = False,
    progress: Progress | None = None,
) -> tuple[ReconstructionSums, FiringCounts]:
    """Encode and decode the first ``max_tokens`` rows of a split in corpus order; the sums carry all metrics.

    With ``grads`` an SAE that selects by gradients gets the cached gradients of the language model's loss. The
    selection then sees the labels, so the result is an upper bound and not comparable with other SAEs.
    """
    check_pair(sae, cache, split)
    total = min(max_tokens or cache.n_split(split), cache.n_split(split))
    clusters = document_of_rows(cache, split, total)
    sums = ReconstructionSums(int(clusters.max()) + 1, torch.tensor(cache.goal.manifest.mean, dtype=torch.float64))
    firing, done = FiringCounts(sae.n_features), 0
    for batch in cache.head(total, batch_size, split=split, grads=grads):
        own = clusters[done : done + len(batch.acts)]
        measure_batch(sae, batch.acts, batch.grads, own, sums, firing, batch.target)
        done += len(batch.acts)
        if progress is not None:
            progress("reconstruction", done, total)
    return sums, firing


def measure_batch(
    sae: SAE,
    x: Tensor,
    grads: Tensor | None,
    clusters: Tensor,
    sums: ReconstructionSums,
    firing: FiringCounts,
    target: Tensor | None = None,
) -> None:
    """Encode and decode rows ``x [n, d_in]`` and add them, or the rows of their target, to the sums."""
    x = x.to(sae.device)
    code = sae.encode(x, None if grads is None else grads.to(sae.device))
    recon, code = sae.reconstruct(x, code), sae.features(code)
    sums.update((x if target is None else target).cpu(), recon.cpu(), code.to("cpu"), clusters)
    firing.update(code)


@torch.no_grad()
def count_firing(
    sae: SAE,
    cache: ActivationCache,
    firing: FiringCounts,
    n_tokens: int,
    *,
    counted: tuple[int, int] = (0, 0),
    batch_size: int = 4096,
    progress: Progress | None = None,
) -> None:
    """Add ``n_tokens`` training rows, in random order, to the counts in ``firing``, but for the rows ``counted``
    (first, stop), which are in them already.

    Whether a latent is dead shows only on many tokens, more than a held-out split has; no reconstruction is measured
    here.
    """
    (first, stop), (low, high) = cache.split_rows("train"), counted
    n_tokens, done = min(n_tokens, stop - first - max(min(high, stop) - max(low, first), 0)), 0
    if n_tokens <= 0:
        return
    with closing(cache.batches(min(batch_size, stop - first), split="train", seed=0)) as batches:
        for batch in batches:
            fresh = batch.acts[(batch.rows < low) | (batch.rows >= high)][: n_tokens - done]
            if not len(fresh):
                continue
            firing.update(sae.features(sae.encode(fresh.to(sae.device))))
            done += len(fresh)
            if progress is not None:
                progress("firing", done, n_tokens)
            if done == n_tokens:
                return
