"""Successive halving: which SAEs are stopped at a rung."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from saelab.sweep.grid import Halving
from saelab.sweep.member import Member
from saelab.training.log import recent_fvu


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


def _value(member: Member, key: str) -> object:
    """What a group agrees in; ``k`` and ``l0`` are two names of one thing."""
    keys = member.entry.keys
    return keys.get("k", keys.get("l0")) if key in {"k", "l0"} else keys.get(key)
