"""Which SAEs of a folder can be compared, and whether they began as the same directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from saelab.errors import UserError
from saelab.runs import Run
from saelab.sae import SAE
from saelab.sae.base import unit_rows

SEEDS = ("seed", "data_seed")
PLACES = (
    ("hook_name", "reads", "a place that is not recorded"),
    ("hook_name_out", "writes to", "the place that it reads"),
)
DIRECTIONS = 64  # random ones, of which the chance level is the mean


def seed_of(run: Run) -> int | None:
    """The seed of its initial weights; None where its files do not say."""
    train = run.metadata.get("train")
    seed = train.get("seed") if isinstance(train, dict) else None
    return seed if isinstance(seed, int) else None


def same_start(run: Run, other: Run) -> bool | None:
    """Whether two SAEs began with the same directions; None where that is not known.

    The rows of a dictionary are drawn one after the other, so SAEs of one seed share their first rows whatever their
    variant and width. Such latents are alike because they started alike, which says nothing of the data.
    """
    seeds = seed_of(run), seed_of(other)
    if None in seeds:
        return None
    return seeds[0] == seeds[1]


def relatives(run: Run, runs: Mapping[str, Run]) -> dict[str, Run]:
    """The other SAEs that read the same activations: those of another seed first, of them the most similar ones.

    The most similar one has the same settings, then come those of the same variant and width.

    A run whose files cannot be read is left out.
    """
    found = {name: other for name, other in runs.items() if not apart(run, other)}
    return dict(sorted(found.items(), key=lambda item: _distance(run, item[1])))


def other_model(run: Run, other: Run) -> bool:
    """Whether two SAEs are known to be of two models, whose activations need have nothing in common."""
    models = run.model_name, other.model_name
    return None not in models and models[0] != models[1]


def apart(run: Run, other: Run) -> str:
    """What keeps two SAEs from being compared, in words; empty where nothing does.

    They must have the same hook point, and the same target where they are transcoders. A transcoder whose file does
    not name its target is beside no SAE, and beside no transcoder but its like.
    """
    if other.name == run.name:
        return "it is the SAE that is open"
    try:
        if not other.has_weights:
            return "it has no weights yet"
        for key, verb, none in PLACES:
            theirs, ours = other.metadata.get(key), run.metadata.get(key)
            if theirs != ours:
                return f"it {verb} {theirs or none}, and {run.name} {verb} {ours or none}"
        for key in ("d_in", "d_out"):
            if other.config.get(key) != run.config.get(key):
                return f"its {key} is {other.config.get(key)}, and that of {run.name} {run.config.get(key)}"
    except (UserError, OSError):
        return "its files cannot be read"
    return ""


def _distance(run: Run, other: Run) -> tuple[int, bool, bool, bool, bool]:
    start = {False: 0, None: 1, True: 2}[same_start(run, other)]
    settings = other.settings != run.settings or _training(other) != _training(run)
    return start, other.variant != run.variant, other.d_sae != run.d_sae, settings, not other.has_index


def _training(run: Run) -> dict[str, Any]:
    """The settings of its training but for the seeds."""
    train = run.metadata.get("train")
    return {name: value for name, value in train.items() if name not in SEEDS} if isinstance(train, dict) else {}


@torch.no_grad()
def chance_cosine(sae: SAE, other: SAE) -> float:
    """Mean cosine of a random direction with the closest row of ``other``'s dictionary: what means nothing.

    The directions are Gaussian with the covariance of the rows of ``sae``'s dictionary, because isotropic ones would
    lie where no dictionary has rows. Where either SAE is signed, a row counts as close with its negative, too.
    """
    generator = torch.Generator().manual_seed(0)
    own, theirs = (unit_rows(one.directions.detach().float().cpu()) for one in (sae, other))
    directions = unit_rows(torch.randn(DIRECTIONS, len(own), generator=generator) @ own)
    cosines = directions @ theirs.T
    return float((cosines.abs() if sae.signed or other.signed else cosines).amax(1).mean())
