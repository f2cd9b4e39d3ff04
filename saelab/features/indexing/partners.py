"""Which latents fire on the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from saelab.features.indexing.groups import distinct, group_top, lists, systematic
from saelab.features.indexing.postings import Entries, Postings

MIN_TOGETHER = 3  # firings seen together before a pair counts: PMI of fewer is noise


class Partners:
    """Co-activation of each slot with all others.

    Up to ``sample`` firings of a slot are looked at, so the cost does not grow with its density: exact for slots that
    fire no more often, otherwise the share of firings that a partner joins has a standard error of at most
    ``0.5 / sqrt(sample)``.
    """

    def __init__(self, postings: Postings, sample: int, listed: int) -> None:
        self.postings, self.sample, self.listed = postings, sample, listed

    def columns(self, entries: Entries, start: int, rng: np.random.Generator) -> dict[str, Any]:
        """The ``listed`` best partners by Jaccard index, then those by PMI not among them."""
        n = len(entries.ptr) - 1
        slots, partners, jaccard, pmi = self._pairs(entries, start, rng)
        first = group_top(slots, jaccard, self.listed)
        rest = np.setdiff1d(group_top(slots, pmi, self.listed), first)
        # Within a slot: by Jaccard first, then by PMI.
        by_pmi = rest[group_top(slots[rest], pmi[rest], self.listed)]
        both = np.concatenate([first, by_pmi])
        both = both[np.argsort(slots[both], kind="stable")]
        latent, pole = partners[both] // 2, 1 - 2 * (partners[both] % 2)
        names = ("partners", "partner_poles", "partner_jaccard", "partner_pmi")
        return dict(zip(names, lists(slots[both], n, latent, pole, jaccard[both], pmi[both])))

    def _pairs(
        self, entries: Entries, start: int, rng: np.random.Generator
    ) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """(slot, partner slot, Jaccard index, PMI) of every pair seen together often enough."""
        counts, n_rows = np.diff(entries.ptr), self.postings.n_rows
        slots, offset, _ = systematic(counts, self.sample, rng)
        rows, _, place = distinct(entries.rows[entries.ptr[slots] + offset])
        row_ptr, codes = self.postings.codes(rows)
        ones = np.ones(len(codes), np.int32)
        active = sparse.csr_matrix((ones, codes, row_ptr), shape=(len(rows), self.postings.n_slots))
        looked = sparse.csr_matrix((np.ones(len(slots), np.int32), (slots, place)), shape=(len(counts), len(rows)))
        together = sparse.coo_matrix(looked @ active)
        keep = (together.data >= MIN_TOGETHER) & (together.col != together.row + start)
        slot, partner, hits = (
            together.row[keep].astype(np.int64),
            together.col[keep].astype(np.int64),
            together.data[keep],
        )
        own, other = counts[slot], self.postings.counts[partner]
        both = np.minimum(hits / np.minimum(own, self.sample) * own, np.minimum(own, other))
        return slot, partner, both / (own + other - both), np.log2(both * n_rows / (own * other))
