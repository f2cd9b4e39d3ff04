"""How many latents of an SAE other seeds of it find again (Paulo and Belrose, 2025, arXiv 2501.16615)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saelab.errors import UserError, damaged
from saelab.files import write_json
from saelab.layout import STABILITY
from saelab.metrics import Estimate, shared_fraction, shared_rows
from saelab.sae import SAE

THRESHOLD = 0.7
FORMULA = (
    f"share of the decoder directions that match one to one at a cosine above {THRESHOLD} with those of another seed "
    "(of the smaller dictionary where widths differ), mean over the seeds"
)


@dataclass(frozen=True)
class Stability:
    """Of each latent, in how many of ``others`` it is found again; ``chance`` is the share for random directions."""

    others: list[str]
    found: list[int]
    chance: float

    @property
    def share(self) -> float:
        """Mean over latents and seeds."""
        return float(np.mean(self.found)) / len(self.others)

    def of(self, latent: int) -> str:
        """One sentence on a latent."""
        seeds = f"{len(self.others)} other seed{'s' if len(self.others) > 1 else ''}"
        return (
            f"{self.found[latent]} of {seeds} have this latent (cosine above {THRESHOLD}); of all latents "
            f"{self.share:.1%} of seeds do, of random directions {self.chance:.1%}"
        )

    def save(self, folder: Path | str) -> Path:
        """Write ``stability.json`` into a run folder."""
        path = Path(folder) / STABILITY
        write_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, folder: Path | str | None) -> Stability | None:
        """The one in a run folder; None where there is none."""
        path = None if folder is None else Path(folder) / STABILITY
        if path is None or not path.is_file():
            return None
        with damaged(path, "evaluate the run again with --seeds"):
            content: dict[str, Any] = json.loads(path.read_bytes())
            return cls(list(content["others"]), [int(n) for n in content["found"]], float(content["chance"]))


def stability(sae: SAE, others: Sequence[SAE], names: Sequence[str]) -> Stability:
    """In how many other seeds each latent of ``sae`` is found again. UserError where there are none, or of another
    width."""
    check(sae, others)
    found = sum(shared_rows(sae.directions, other.directions, THRESHOLD, sae.signed).long() for other in others)
    chance = [shared_fraction(sae.directions, other.directions, THRESHOLD, sae.signed)[1] for other in others]
    return Stability(list(names), found.tolist(), float(np.mean(chance)))  # pyright: ignore[reportAttributeAccessIssue]


def shared_with_seeds(sae: SAE, others: Sequence[SAE]) -> dict[str, Estimate]:
    """``latents_shared_by_seeds``, and what directions at random would share, for other seeds of ``sae``.

    There is no interval: pairs that all contain this SAE say nothing of how much the share varies between SAEs.
    """
    check(sae, others)
    found = np.array([shared_fraction(sae.directions, other.directions, THRESHOLD, sae.signed) for other in others])
    names = {"latents_shared_by_seeds": FORMULA, "latents_shared_by_chance": f"{FORMULA}, with directions at random"}
    return {name: _over_seeds(values, sae.d_sae, formula) for (name, formula), values in zip(names.items(), found.T)}


def check(sae: SAE, others: Sequence[SAE]) -> None:
    """Refuse SAEs that cannot be other seeds of ``sae``."""
    if not others:
        raise UserError("there is no other seed to compare with; name runs of the same SAE with other seeds")
    for other in others:
        if (other.d_in, other.d_out, other.transcodes) != (sae.d_in, sae.d_out, sae.transcodes):
            raise UserError(f"{_kind(sae)} and {_kind(other)} share no latents; name other seeds of one SAE")
        if other.W_dec.shape == sae.W_dec.shape and bool((other.W_dec == sae.W_dec).all()):
            raise UserError("one of the SAEs named as other seeds is the SAE itself; name runs with other seeds")


def _kind(sae: SAE) -> str:
    return f"a transcoder of d_in={sae.d_in}, d_out={sae.d_out}" if sae.transcodes else f"an SAE of d_in={sae.d_in}"


def _over_seeds(values: np.ndarray, n: int, formula: str) -> Estimate:
    seeds = f"{len(values)} other seed{'s' if len(values) > 1 else ''}"
    return Estimate(float(values.mean()), None, None, n, "latent", formula, f"none: cannot say from {seeds} of one SAE")
