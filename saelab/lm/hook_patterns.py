"""Many hook points by one pattern: ``blocks.*.hook_resid_post``, ``blocks.3,9,15.mlp.hook_in``, ``blocks.0-5.hook_*``.

A pattern is a hook name (or a module path) with a ``*``, a list or a range in the place of the layer's number, and with
``*`` and ``?`` in its other parts. ``0-29:3`` is every third layer of a range.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from saelab.errors import UserError, near_matches
from saelab.lm.hook_names import layer_of
from saelab.lm.sites import POINTS, locate
from saelab.lm.structure import blocks, opened

_NUMBERS = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*")


def is_pattern(name: str) -> bool:
    """Whether a name may stand for several hook points."""
    return any(_is_wild(part) or (_NUMBERS.fullmatch(part) and not part.isdigit()) for part in name.split("."))


def expand(model: Any, names: Sequence[str]) -> list[str]:
    """The hook points that ``names``, some of them patterns, stand for in a model; in the order of its layers.

    A name is kept as it is. UserError for a pattern that no hook point matches, or a layer that the model lacks.
    """
    n_layers = len(blocks(opened(model))[1])
    found = [point for name in names for point in (_points(model, name, n_layers) if is_pattern(name) else [name])]
    return list(dict.fromkeys(found))


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that a pattern stands for, by layer; the name alone where it is none. May be empty."""
    found = [name for name in names if _matches(pattern, name)]
    return sorted(found, key=layer_order)


def layer_order(name: str) -> tuple[int, str]:
    """Sort key: by layer, names without one last."""
    layer = layer_of(name)
    return (1 << 30 if layer is None else layer), name


def at_layer_of(pattern: str, name: str) -> str:
    """The pattern with the layer of ``name`` in the place of its ``*``; without one it is kept."""
    layer = layer_of(name)
    if "*" not in pattern.split("."):
        return pattern
    if layer is None:
        raise UserError(f"{pattern} takes the layer of {name}, which has none; name one hook point")
    return ".".join(str(layer) if part == "*" else part for part in pattern.split("."))


def _points(model: Any, pattern: str, n_layers: int) -> list[str]:
    parts = pattern.split(".")
    at = next((i for i, part in enumerate(parts) if part == "*" or _NUMBERS.fullmatch(part)), None)
    layers = [None] if at is None else _layers(parts[at], pattern, n_layers)
    found = []
    for layer in layers:
        own = ".".join(str(layer) if i == at else part for i, part in enumerate(parts))
        found += [own] if not _is_wild(own) else _existing(model, own, n_layers)
    if not found:
        known = [f"blocks.0.{point}" for point in POINTS]
        raise UserError(f"no hook point of the model matches {pattern!r}: {near_matches(pattern, known)}")
    return found


def _layers(part: str, pattern: str, n_layers: int) -> list[int]:
    if part == "*":
        return list(range(n_layers))
    found = sorted({number for piece in part.split(",") for number in _range(piece, pattern)})
    if found[-1] >= n_layers:
        raise UserError(f"{pattern}: the model has {n_layers} blocks, 0 to {n_layers - 1}, and no {found[-1]}")
    return found


def _range(piece: str, pattern: str) -> range:
    first, _, rest = piece.partition("-")
    last, _, step = rest.partition(":")
    if (last and int(last) < int(first)) or step == "0":
        raise UserError(f"{pattern}: {piece} is no range of layers; write it as 3-7, or 0-29:3 for every third")
    return range(int(first), int(last or first) + 1, int(step or 1))


def _existing(model: Any, pattern: str, n_layers: int) -> list[str]:
    """The points of blocks that match and can be read; module paths are not searched."""
    names = [f"blocks.{layer}.{point}" for layer in range(n_layers) for point in POINTS]
    return [name for name in matching(pattern, names) if _can_be_read(model, name)]


def _can_be_read(model: Any, name: str) -> bool:
    try:
        return locate(model, name).side != "inner"
    except UserError:
        return False


def _matches(pattern: str, name: str) -> bool:
    wanted, parts = pattern.split("."), name.split(".")
    if len(wanted) != len(parts):
        return False
    for want, part in zip(wanted, parts):
        if _NUMBERS.fullmatch(want) and not want.isdigit():
            if not part.isdigit() or int(part) not in {n for piece in want.split(",") for n in _range(piece, pattern)}:
                return False
        elif not fnmatchcase(part, want):
            return False
    return True


def _is_wild(text: str) -> bool:
    return "*" in text or "?" in text
