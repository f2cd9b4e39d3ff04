"""Successive halving: which SAEs are stopped at a rung."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from saelab.sae import VARIANTS
from saelab.sweep.grid import Halving
from saelab.sweep.member import Member
from saelab.training.log import recent_fvu

# Share of the steps -> how many times the best rate's FVU stops a rate that is being tuned. A fixed share of the rates
# would be wrong: at a constant rate a high one looks worse than after the decay, and early in a run a low one does. For
# topk and batch_topk on SmolLM2 and Gemma 3, six rates each, the ratio to the best rate was up to 1.3 times that at the
# end at a quarter of the steps, and up to 1.2 times at half of them, so what is stopped would have ended behind.
STRAGGLING = {0.25: 1.5, 0.5: 1.25}


def losers(halving: Halving, members: Sequence[Member], rung: int, total: int) -> list[Member]:
    """The members to stop: in each group the worst by smoothed FVU, so that a share ``keep`` (at least one) stays."""
    groups: dict[tuple, list[Member]] = defaultdict(list)
    for member in members:
        groups[tuple(str(_value(member, key)) for key in halving.within)].append(member)
    lost = []
    for group in groups.values():
        ranked = sorted(group, key=lambda m: recent_fvu(m.folder, rung, total))
        lost += ranked[max(1, math.ceil(halving.keep * len(group))) :]
    return lost


def stragglers(groups: Iterable[Sequence[Member]], share: float, rung: int, total: int) -> list[Member]:
    """The members to stop where rates are tuned: those far behind the best of their group after as many tokens.

    None of a variant with a penalty, whose L0, and so its FVU, is on its way until the end.
    """
    lost = []
    for group in groups:
        running = [m for m in group if m.status == "running" and VARIANTS[m.entry.variant].l0_option != "l0"]
        recent = {m.entry.name: recent_fvu(m.folder, rung, total) for m in running}
        lost += [m for m in running if recent[m.entry.name] > STRAGGLING[share] * min(recent.values())]
    return lost


def _value(member: Member, key: str) -> object:
    """What a group agrees in; ``k``, ``l0`` and ``n_steps`` are names of one thing, whatever a variant calls it."""
    entry = member.entry
    if key in {"k", "l0", "n_steps"}:
        return None if entry.l0 is None else float(entry.l0)
    return entry.keys.get(key)
