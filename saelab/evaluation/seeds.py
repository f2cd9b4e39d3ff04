"""How many latents of an SAE other seeds of it find again (Paulo and Belrose, 2025, arXiv 2501.16615)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saelab.errors import UserError
from saelab.metrics import Estimate, shared_fraction
from saelab.sae import SAE

THRESHOLD = 0.7
FORMULA = (
    f"share of the decoder directions that match one to one at a cosine above {THRESHOLD} with those of another seed "
    "(of the smaller dictionary where widths differ), mean over the seeds"
)


def shared_with_seeds(sae: SAE, others: Sequence[SAE]) -> dict[str, Estimate]:
    """``latents_shared_by_seeds``, and what directions at random would share, for other seeds of ``sae``."""
    for other in others:
        if other.d_in != sae.d_in:
            raise UserError(f"SAEs of d_in={sae.d_in} and {other.d_in} share no latents; name other seeds of one SAE")
    found = np.array([shared_fraction(sae.W_dec, other.W_dec, THRESHOLD, sae.signed) for other in others])
    why = f"none: {len(others)} other seed{'s' if len(others) > 1 else ''}"
    names = {"latents_shared_by_seeds": FORMULA, "latents_shared_by_chance": f"{FORMULA}, with directions at random"}
    return {
        name: Estimate(float(values.mean()), None, None, sae.d_sae, "latent", formula, why)
        for (name, formula), values in zip(names.items(), found.T)
    }
