"""How well the code reconstructs, and how sparse it is: streaming float64 sums over a whole evaluation set."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import UserError
from saelab.metrics.intervals import Array, Estimate, from_resamples, resampled_sums
from saelab.sparse import SparseCode

# name -> formula; t runs over the n tokens of the set, e = x - recon, mu = mean of x over the set, d = d_in
FORMULAS = {
    "fvu": "sum_t |e_t|^2 / sum_t |x_t - mu|^2",
    "explained_variance": "1 - fvu",
    "mse": "mean_t |e_t|^2, summed over dimensions",
    "nmse": "mean_t |e_t|^2 / |x_t|^2, not centred",
    "cosine": "mean_t cos(x_t, recon_t); a zero reconstruction counts as 0",
    "l2_ratio": "mean_t |recon_t| / |x_t|",
    "relative_reconstruction_bias": "mean_t |recon_t|^2 / mean_t x_t.recon_t; below 1 is shrinkage",
    "l0": "mean_t #{j: code_tj != 0}",
    "l1": "mean_t sum_j |code_tj|",
}
# What other tools report under similar names, for comparison with their numbers only.
LEGACY = {
    "legacy_fraction_variance_explained": "1 - sum_d Var_t(e) / sum_d Var_t(x): the residual is centred, so a constant"
    " error is free (dictionary_learning)",
    "legacy_explained_variance_per_token": "mean_t 1 - |e_t|^2 / |x_t - mu|^2: a mean of ratios, unbounded below; mu is"
    " the cache's mean (SAELens and SAEBench, explained_variance_legacy)",
    "legacy_explained_variance_squared_moment": "1 - mean|e|^2 / (mean|x|^2 - (mean|x|^2 / d)^2): squares E[x^2] for"
    " E[x], not invariant under scaling (SAELens 6.18, SAEBench 0.6.0)",
    "legacy_mse_per_batch": "mse / 2048: the squared error divided by the tokens of a batch, 16 contexts of 128, once"
    " more (SAEBench, mse)",
    "legacy_l1_with_signs": "mean_t sum_j code_tj, which is l1 where no value is negative (SAEBench, l1)",
    "legacy_r2_global": "1 - mean (x - recon)^2 / mean (x - m)^2 with m one scalar over all entries (Overcomplete)",
}
SAEBENCH_BATCH = 16 * 128  # tokens of a batch of its core evaluation, by default
MOST = 512  # documents, or groups of them, in a report
ROWS = 256  # taken together in the float64 sums
HELD = 1 << 25  # numbers of a vector per document: 256 MiB, twice, and once more while they are resampled
_COLUMNS = (
    *("n", "sse", "xx", "rr", "xr", "yy", "l0", "l1", "sum", "n_ratio"),
    *("nmse", "cosine", "l2_ratio", "n_y", "y_ratio"),
)


class ReconstructionSums:
    """Sums per document from which every metric and its bootstrap follow.

    Where there are too many documents to hold (each row of an imported cache may be one), neighbours share their sums
    and are resampled together.

    Deviations are taken from ``centre`` (the cache's mean) before they are squared, so that a large common offset
    costs no digits; the result does not depend on it, except where a formula says so.
    """

    def __init__(self, n_documents: int, centre: Float[Tensor, " d_in"]) -> None:
        self.centre = centre.double()
        d_in = centre.numel()
        self.shared = max(1, -(-n_documents * d_in // HELD))  # documents to a sum
        n_sums = -(-n_documents // self.shared)
        self.columns = torch.zeros(n_sums, len(_COLUMNS), dtype=torch.float64)
        self.sum_y = torch.zeros(n_sums, d_in, dtype=torch.float64)
        self.sum_e = torch.zeros(n_sums, d_in, dtype=torch.float64)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "n d_in"],
        recon: Float[Tensor, "n d_in"],
        code: SparseCode,
        documents: Int[Tensor, " n"],
    ) -> None:
        """Add one batch; ``documents`` numbers the document of each token."""
        documents = documents // self.shared
        # A few rows at a time: their float64 copies then stay in the processor's cache.
        parts = [self._products(*part) for part in zip(x.split(ROWS), recon.split(ROWS), documents.split(ROWS))]
        sse, xx, rr, xr, yy = torch.cat(parts, dim=1)
        values, zeros = code.values.double(), torch.zeros(code.n, dtype=torch.float64)
        l1, total = (zeros.index_add(0, code.rows(), part) for part in (values.abs(), values))
        ratio, y_ratio = (xx > 0).double(), (yy > 0).double()
        safe_x, safe_y = xx.where(xx > 0, 1.0), yy.where(yy > 0, 1.0)
        cosine = xr / (safe_x * rr.where(rr > 0, 1.0)).sqrt()
        columns = [torch.ones_like(sse), sse, xx, rr, xr, yy, code.l0().double(), l1, total, ratio]
        columns += [ratio * sse / safe_x, ratio * cosine, ratio * (rr / safe_x).sqrt(), y_ratio, y_ratio * sse / safe_y]
        self.columns.index_add_(0, documents, torch.stack(columns, dim=1))

    def _products(self, x: Tensor, recon: Tensor, documents: Tensor) -> Float[Tensor, "5 n"]:
        x, recon = x.double(), recon.double()
        y, e = x - self.centre, x - recon
        self.sum_y.index_add_(0, documents, y)
        self.sum_e.index_add_(0, documents, e)
        pairs = ((e, e), (x, x), (recon, recon), (x, recon), (y, y))
        return torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs])

    @property
    def n(self) -> int:
        """Tokens seen."""
        return int(self.columns[:, 0].sum())

    def by_document(self) -> dict[str, list[float]]:
        """Tokens, squared error and squared deviation from the set's mean of each document; neighbours share numbers
        where there are more than 512 documents.

        From these follow FVU and, for two SAEs, an interval of their difference on the same text.
        """
        shift = self.sum_y.sum(0) / self.n  # mean - centre
        n, sse, yy = (self.columns[:, _COLUMNS.index(name)] for name in ("n", "sse", "yy"))
        deviation = yy - 2 * self.sum_y @ shift + n * shift.square().sum()
        parts = torch.stack([n, sse, deviation.clamp_min(0)])[:, n > 0]
        group = torch.arange(parts.shape[1]) // -(-parts.shape[1] // MOST)
        summed = parts.new_zeros(3, int(group[-1]) + 1).index_add_(1, group, parts)
        return dict(zip(("tokens", "squared_error", "squared_deviation"), summed.tolist()))

    def estimates(self, seed: int = 0) -> dict[str, Estimate]:
        """Every metric of ``FORMULAS`` and of ``LEGACY``, with intervals over documents."""
        filled = self.columns[:, 0] > 0
        n_sums = int(filled.sum())
        if n_sums == 0:
            raise UserError("there are no tokens to evaluate; the split is empty: harvest more text")
        sums = (part[filled].numpy() for part in (self.columns, self.sum_y, self.sum_e))
        columns, sum_y, sum_e = resampled_sums(*sums, seed=seed)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = _ratios(dict(zip(_COLUMNS, columns.T)), sum_y, sum_e, self.centre.numpy())
        if not np.isfinite(values["fvu"][0]):
            raise UserError("all evaluated activations are equal, so no share of variance exists; evaluate more tokens")
        over = "documents" if self.shared == 1 else f"groups of {self.shared} documents"
        return {
            name: from_resamples(values[name], self.n, "token", formula, n_sums, over)
            for name, formula in {**FORMULAS, **LEGACY}.items()
            if np.isfinite(values[name][0])
        }


def _ratios(s: dict[str, Array], sum_y: Array, sum_e: Array, centre: Array) -> dict[str, Array]:
    n, d = s["n"], centre.size
    # The rounding of float64 leaves a tiny positive remainder for constant data: that is no variance.
    variance = _above_rounding(s["yy"] - np.square(sum_y).sum(1) / n, s["yy"])
    residual = s["sse"] - np.square(sum_e).sum(1) / n
    sum_x = sum_y.sum(1) + n * centre.sum()
    m2 = s["xx"] / n
    fvu = s["sse"] / variance
    return {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": s["sse"] / n,
        "nmse": s["nmse"] / s["n_ratio"],
        "cosine": s["cosine"] / s["n_ratio"],
        "l2_ratio": s["l2_ratio"] / s["n_ratio"],
        "relative_reconstruction_bias": s["rr"] / s["xr"],
        "l0": s["l0"] / n,
        "l1": s["l1"] / n,
        "legacy_fraction_variance_explained": 1 - residual / variance,
        "legacy_explained_variance_per_token": 1 - s["y_ratio"] / s["n_y"],
        "legacy_explained_variance_squared_moment": 1 - s["sse"] / n / (m2 - (m2 / d) ** 2),
        "legacy_mse_per_batch": s["sse"] / n / SAEBENCH_BATCH,
        "legacy_l1_with_signs": s["sum"] / n,
        "legacy_r2_global": 1 - s["sse"] / _above_rounding(s["xx"] - sum_x**2 / (n * d), s["xx"]),
    }


def _above_rounding(difference: Array, scale: Array) -> Array:
    return np.where(difference > 1e-12 * scale, difference, np.nan)
