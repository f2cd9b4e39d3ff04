"""The latents of a text in the order in which they tell something of it, and those that fire on nearly everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from saelab.errors import UserError
from saelab.metrics.density import DENSE
from saelab.prompt.reading import Reading

RANKINGS = {
    "telling": "activation / the latent's own maximum in the corpus × bits of a firing (-log₂ density)",
    "share": "activation / the latent's own maximum in the corpus",
    "activation": "activation, raw units: favours latents that are always on",
    "effect": "|activation × decoder row · gradient of the next-token loss|, nats, to first order",
}
CHUNK = 8192  # active latents whose decoder rows are taken at a time


class Ranked(NamedTuple):
    """A latent's pole on a text: its score and activation on the token where the score is highest."""

    latent: int
    pole: int
    score: float
    activation: float
    position: int


@dataclass(frozen=True)
class Known:
    """What an index knows of each latent's two poles, ``[2, d_sae]``, the positive one first; zeros where it has none.

    Attributes:
        maximum: Largest magnitude in the corpus, raw units.
        density: Share of the corpus's tokens it fires on.
        tokens: Tokens of the corpus.
    """

    maximum: NDArray[np.float64]
    density: NDArray[np.float64]
    tokens: int

    @classmethod
    def of(cls, table: pd.DataFrame, d_sae: int, tokens: int) -> Known:
        """From the table of an index: one row per latent and pole."""
        found = {name: np.zeros((2, d_sae)) for name in ("max", "density")}
        side = (table["pole"].to_numpy() < 0).astype(int)
        for name, values in found.items():
            values[side, table["latent"].to_numpy()] = table[name].to_numpy()
        return cls(found["max"], found["density"], tokens)


def rank(
    reading: Reading,
    by: str = "telling",
    known: Known | None = None,
    W_dec: Float[Tensor, "d_sae d_in"] | None = None,
    *,
    position: int | None = None,
    hide_dense: bool = False,
) -> tuple[list[Ranked], int]:
    """The (latent, pole)s that fire on a text, highest score first, and how many dense ones were left out.

    ``by`` is one of ``RANKINGS``: "telling" and "share" need ``known``, "effect" needs ``W_dec`` and a reading with
    gradients. ``position`` ranks those of one token; without it the first positions, which the SAE was not trained on,
    do not count. ``hide_dense`` leaves out those that fire on more than 10 % of the corpus. A latent that fires more
    strongly here than in the corpus has this activation for its maximum. Raises UserError for what a ranking lacks.
    """
    first, last = (reading.first, reading.n) if position is None else (position, position + 1)
    code = reading.code[first:last].detach().nonzero()
    latents, values = code.indices.cpu().numpy(), code.values.float().cpu().numpy().astype(float)
    positions, side = code.rows().cpu().numpy() + first, (values < 0).astype(int)
    score = _score(reading, by, known, W_dec, latents, values, positions, side)
    frame: Any = pd.DataFrame(
        {"latent": latents, "side": side, "score": score, "activation": values, "position": positions}
    )
    frame = frame.sort_values(["score", "latent"], ascending=[False, True], kind="stable")
    frame = frame.drop_duplicates(["latent", "side"])
    dense = np.zeros(len(frame), dtype=bool)
    if known is not None and hide_dense:
        dense = known.density[frame["side"], frame["latent"]] > DENSE
    kept = frame[~dense]
    columns = (kept[name].tolist() for name in ("latent", "side", "score", "activation", "position"))
    rows = [Ranked(latent, -1 if side else 1, *rest) for latent, side, *rest in zip(*columns)]
    return rows, int(dense.sum())


def _score(
    reading: Reading,
    by: str,
    known: Known | None,
    W_dec: Tensor | None,
    latents: NDArray[Any],
    values: NDArray[Any],
    positions: NDArray[Any],
    side: NDArray[Any],
) -> NDArray[np.float64]:
    if by == "activation":
        return np.abs(values)
    if by == "effect":
        if reading.grads is None or W_dec is None:
            raise UserError("ranking by effect needs gradients; read the text with them")
        return np.abs(effects(reading, W_dec, latents, positions) * values)
    if by not in RANKINGS:
        raise UserError(f"{by!r} is no ranking; known: {', '.join(RANKINGS)}")
    if known is None:
        raise UserError(f"ranking by {by!r} needs a feature index; build it with saelab index")
    share = np.abs(values) / np.maximum(known.maximum[side, latents], np.abs(values))
    if by == "share":
        return share
    return share * -np.log2(np.maximum(known.density[side, latents], 0.5 / max(known.tokens, 1)))


@torch.no_grad()
def effects(
    reading: Reading, W_dec: Float[Tensor, "d_sae d_in"], latents: NDArray[Any], positions: NDArray[Any]
) -> NDArray[np.float64]:
    """Decoder row · gradient of the loss for each (latent, position): loss per unit of activation, to first order."""
    assert reading.grads is not None
    slopes = []
    for start in range(0, len(latents), CHUNK):
        rows = W_dec[torch.as_tensor(latents[start : start + CHUNK], device=W_dec.device)]
        grads = reading.grads[torch.as_tensor(positions[start : start + CHUNK], device=reading.grads.device)]
        slopes.append((rows.double() * grads.to(rows.device).double()).sum(1).cpu())
    return torch.cat(slopes).numpy() if slopes else np.zeros(0)
