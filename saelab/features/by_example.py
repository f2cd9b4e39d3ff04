"""Search by example: find latents that fire on a marked span and not on contrast text."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Bool
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from saelab.errors import UserError
from saelab.features.index import FeatureIndex
from saelab.sae.normalised import BEFORE, Normalised
from saelab.sparse import SparseCode


def find_by_example(
    index: FeatureIndex,
    code: SparseCode,
    span: Bool[Tensor, " n"],
    contrast: SparseCode | None = None,
    *,
    rest: bool = True,
    top: int = 50,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """(latent, pole)s ranked by how specific they are to the marked tokens.

    ``code`` is the code of the example text and ``span [n]`` marks the tokens that are meant; the tokens of
    ``contrast``, and with ``rest`` the unmarked ones, must not fire. With ``m`` the magnitude over the largest in the
    corpus (``FeatureIndex.max_activation``),

        specificity = (mean m over the span - mean m over the contrast) * -log2(density in the corpus)

    so a latent that fires everywhere ranks low however strong it is. ``low`` and ``high`` are the 5 % and 95 %
    quantiles over bootstrap samples of the tokens (of one token there is only one sample). Only latents that fire on
    the span are listed. Raises UserError for an empty span or a code of another width.
    """
    marked = span.cpu().numpy().astype(bool)
    if len(marked) != code.n or not marked.any():
        raise UserError(f"the span marks {int(marked.sum())} of {code.n} tokens; mark at least one")
    # An index of 0.1.0 lists what an SAE of normalised activations carries about tokens behind its latents.
    carries = index.meta["variant"] in (Normalised.variant, BEFORE)
    if code.d_sae != index.d_sae and not (carries and code.d_sae < index.d_sae):
        raise UserError(f"the code has d_sae={code.d_sae}, the index d_sae={index.d_sae}; use the same SAE")
    table = index.table()
    rows = _matrix(code)
    inside, outside = rows[marked], rows[~marked] if rest else rows[:0]
    if contrast is not None:
        outside = sparse.csr_matrix(sparse.vstack([outside, _matrix(contrast)]))
    slots = np.unique(inside.indices)
    n_poles = len(index.poles)
    slots = slots[(slots % 2 == 0) | (n_poles == 2)]
    known = table.iloc[slots // 2 * n_poles + slots % 2]
    a, b = (_dense(part, slots) for part in (inside, outside))
    largest = np.maximum(known["max"].to_numpy(), np.maximum(a.max(0, initial=0), b.max(0, initial=0)))
    density = np.maximum(known["density"].to_numpy(), 0.5 / index.meta["tokens"])
    weight = -np.log2(density) / largest
    rng = np.random.default_rng(seed)
    samples = [(_resample(a, rng) - _resample(b, rng)) * weight for _ in range(resamples)]
    low, high = np.quantile(samples, [0.05, 0.95], axis=0) if resamples else (np.nan, np.nan)
    found = pd.DataFrame(
        {
            "latent": known["latent"].to_numpy(),
            "pole": known["pole"].to_numpy(),
            "specificity": (_mean(a) - _mean(b)) * weight,
            "low": low,
            "high": high,
            "on_span": (a > 0).mean(0),
            "off_span": (b > 0).mean(0) if len(b) else 0.0,
            "density": known["density"].to_numpy(),
            "label": known["label"].to_numpy(),
        }
    )
    return found.sort_values(by=["specificity", "latent"], ascending=[False, True]).head(top).reset_index(drop=True)


def _matrix(code: SparseCode) -> sparse.csr_matrix:
    """Magnitudes by token and slot."""
    code = code.detach().nonzero().to("cpu")
    values, indices = code.values.float().numpy(), code.indices.numpy()
    slots = 2 * indices + (values < 0)
    return sparse.csr_matrix((np.abs(values), slots, code.row_ptr.numpy()), shape=(code.n, 2 * code.d_sae))


def _dense(part: sparse.csr_matrix, slots: NDArray[np.integer]) -> NDArray[np.float64]:
    return np.asarray(part[:, slots].todense(), np.float64)


def _mean(part: NDArray[np.float64]) -> NDArray[np.float64]:
    return part.mean(0) if len(part) else np.zeros(part.shape[1])


def _resample(part: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    return _mean(part[rng.integers(0, len(part), len(part))]) if len(part) else _mean(part)
