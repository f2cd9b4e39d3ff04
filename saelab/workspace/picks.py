"""Picks of the Steering page as words of an address, and back.

``12;add;0.8max;generated`` adds latent 12 on generated tokens; ``-12`` is its negative pole. ``when=7>0.5``,
``schedule=0:1,20:0`` and ``layers=4-8`` limit the change, or repeat it at other layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from saelab.errors import UserError
from saelab.runs import Run
from saelab.steering import OPERATIONS, Condition, LatentFires, Schedule
from saelab.steering.layers import parse_layers
from saelab.steering.vectors import parse_strength
from saelab.workspace.steering import PLACES, Pick, condition_text, operations, pick_latent, schedule_text, units

LATENT = re.compile(r"(-?)(\d+)")
CONDITION = re.compile(r"(-?)(\d+)>(\d+(?:\.\d*)?(?:e[+-]?\d+)?)")


def pick_text(pick: Pick) -> str | None:
    """A pick as one word; None for what an address cannot hold: vectors, probes, and settings of a recipe's own."""
    own = pick.skip_first is not None or pick.keep_error is not None or pick.where not in PLACES
    if pick.latent is None or own or not (pick.when is None or isinstance(pick.when, LatentFires)):
        return None
    amount = OPERATIONS[pick.operation].amount
    number = "" if amount is None else f"{pick.amount:g}{pick.unit if amount.units else ''}"
    words = [f"{'-' * (pick.pole < 0)}{pick.latent}", pick.operation, number, str(pick.where)]
    if pick.when is not None:
        words.append("when=" + condition_text(pick.when))
    if pick.schedule is not None:
        words.append("schedule=" + schedule_text(pick.schedule))
    if pick.layers:
        words.append(f"layers={pick.layers}")
    return ";".join(words)


def read_picks(texts: Sequence[str], source: Run) -> list[Pick]:
    """The picks that an address names. Raises UserError for what is none, or is none of this SAE."""
    return [_pick(text, source) for text in texts]


def renewed(pick: Pick, source: Run) -> Pick:
    """A pick of an SAE that was trained again, as its files are now; a vector made of texts or of a recipe stays.

    Raises UserError for a latent that it no longer has.
    """
    if pick.latent is None:
        return pick
    source.check_latent(pick.latent)
    fresh = pick_latent(source, pick.latent, pick.pole)
    pick = pick.changed(vector=fresh.vector, unit=pick.unit if pick.unit in units(fresh) else fresh.unit)
    if isinstance(pick.when, LatentFires):
        pick = pick.changed(when=condition(condition_text(pick.when), source))
    return pick


def _pick(text: str, source: Run) -> Pick:
    latent, operation, number, where, *limits = [*text.split(";"), "", "", ""][: max(4, text.count(";") + 1)]
    found = LATENT.fullmatch(latent)
    if found is None:
        raise UserError(f"the address has the pick {text[:60]!r}, which does not begin with a latent's number")
    source.check_latent(int(found[2]))
    pick = pick_latent(source, int(found[2]), -1 if found[1] else 1)
    operation = operation or "add"
    if operation not in operations(pick):
        raise UserError(
            f"the address asks for the operation {operation[:40]!r}; there are {', '.join(operations(pick))}"
        )
    if (where := where or "all") not in PLACES:
        raise UserError(f"the address steers on {where[:40]!r}; there are {', '.join(PLACES)}")
    return _limited(_sized(pick.changed(operation=operation, where=where), number), limits, source)


def _sized(pick: Pick, number: str) -> Pick:
    amount = OPERATIONS[pick.operation].amount
    if amount is None or not number:
        return pick
    value, unit = parse_strength(number)
    if unit and not (amount.units and unit in units(pick)):
        raise UserError(f"the address gives {pick.operation} the number {number[:40]}, whose unit is not known here")
    return pick.changed(amount=value, start=value, unit=unit or pick.unit)


def _limited(pick: Pick, limits: Sequence[str], source: Run) -> Pick:
    for limit in limits:
        name, _, value = limit.partition("=")
        if name == "when":
            pick = pick.changed(when=condition(value, source))
        elif name == "schedule":
            pick = pick.changed(schedule=Schedule.parse(value))
        elif name == "layers":
            parse_layers(value)
            pick = pick.changed(layers=value)
        else:
            raise UserError(f"the address limits steering by {limit[:40]!r}; known are when=, schedule= and layers=")
    return pick


def condition(text: str, source: Run) -> Condition:
    """``7>0.5`` or ``-7>0.5``: a latent of the SAE, one of its poles, and the activation it must exceed."""
    found = CONDITION.fullmatch(text.replace(" ", ""))
    if found is None:
        raise UserError(f"{text[:40]!r} is no condition; 7>0.5 acts where latent 7 is above 0.5, 7>0 where it fires")
    above: Any = float(found[3])
    return LatentFires(source, int(found[2]), above, -1 if found[1] else 1)
