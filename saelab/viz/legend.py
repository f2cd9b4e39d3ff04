"""One legend for several charts of the same curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from saelab.viz.escape import plain
from saelab.viz.theme import Palette

SEED = re.compile(r"_seed-\d+")
# Of each dash its pieces in pixels: drawn, left out, drawn ...
DASHES = {"solid": (1,), "dash": (8, 4), "dot": (2, 3), "dashdot": (8, 3, 2, 3), "longdash": (14, 4)}


class Look(NamedTuple):
    """How a curve is drawn."""

    colour: str
    dash: str


def looks(names: Sequence[str], colours: Palette) -> dict[str, Look]:
    """A look for each curve: runs that differ by their seed alone share the colour and have dashes of their own.

    Where nothing differs by its seed alone, dashes change with the colour, for those who cannot tell colours apart.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(SEED.sub("", name), []).append(name)
    found, dashes, seeds = {}, list(DASHES), len(kinds) < len(names)
    for i, members in enumerate(kinds.values()):
        colour, turn = colours.series[i % len(colours.series)], i // len(colours.series)
        for j, name in enumerate(members):
            found[name] = Look(colour, dashes[(j + turn if seeds else i + turn) % len(dashes)])
    return {name: found[name] for name in names}


def line_legend(known: Mapping[str, Look]) -> str:
    """The names beside a piece of each line, as HTML; names are escaped."""
    keys = "".join(
        f'<span class="sl-key"><span class="sl-line" style="background:{_stripes(look)}"></span>{plain(name)}</span>'
        for name, look in known.items()
    )
    return f'<div class="sl-keys" role="note" aria-label="legend">{keys}</div>'


def _stripes(look: Look) -> str:
    pieces, at, drawn = DASHES[look.dash], 0, True
    stops = []
    for length in pieces:
        colour = look.colour if drawn else "transparent"
        stops += [f"{colour} {at}px", f"{colour} {at + length}px"]
        at, drawn = at + length, not drawn
    return f"repeating-linear-gradient(90deg,{','.join(stops)})"
