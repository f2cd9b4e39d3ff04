"""The caches of a sweep: one, or a folder of them, as a harvest at several hook points writes it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, near_matches
from saelab.layout import MANIFEST
from saelab.lm.hook_patterns import at_layer_of, layer_order, matching

Pair = tuple[str, str]  # names of a cache and of its target; "" for the only cache, and for no target


@dataclass(frozen=True)
class Caches:
    """Caches by name. ``only`` is the one of a sweep on a single cache, and the others those that lie beside it."""

    by_name: Mapping[str, ActivationCache]
    only: ActivationCache | None = None
    paired: dict[Pair, ActivationCache] = field(default_factory=dict)

    @classmethod
    def of(cls, caches: Caches | ActivationCache | Mapping[str, ActivationCache]) -> Caches:
        """From one cache, or from several by name."""
        if isinstance(caches, Caches):
            return caches
        return cls(dict(caches)) if isinstance(caches, Mapping) else cls({}, caches)

    @classmethod
    def open(cls, folder: Path | str | os.PathLike[str]) -> Caches:
        """The cache in a folder, or the caches in its sub-folders. UserError where there is neither, or for caches of
        several models."""
        path = Path(folder)
        if (path / MANIFEST).is_file() or not path.is_dir():
            return cls({}, ActivationCache(folder))
        found = {sub.name: ActivationCache(sub) for sub in sorted(path.iterdir()) if (sub / MANIFEST).is_file()}
        if not found:
            raise UserError(f"{folder} is neither a cache nor a folder of caches; make one with `saelab harvest`")
        models = sorted({cache.manifest.model for cache in found.values()} - {""})
        if len(models) > 1:  # their numbers do not compare, and a table has no column that tells them apart
            raise UserError(
                f"{folder} holds caches of several models ({', '.join(models)}); sweep those of one at a time"
            )
        weights = sorted({cache.manifest.weights_fingerprint for cache in found.values()} - {""})
        if len(weights) > 1:  # other revisions or precisions of one name
            raise UserError(
                f"{folder} holds caches of several weights of one model ({', '.join(weights)}); "
                "sweep those of one at a time"
            )
        return cls(found)

    @property
    def names(self) -> list[str]:
        """The names to choose from, by layer; none for a single cache."""
        return [] if self.only is not None else by_layer(self.by_name)

    def get(self, pair: Pair) -> ActivationCache:
        """A cache, with its target if it has one. UserError for caches of two harvests."""
        if pair not in self.paired:
            name, target = pair
            cache = self.only if self.only is not None else self.by_name[name]
            self.paired[pair] = cache if not target else cache.with_target(self._target(cache, target))
        return self.paired[pair]

    def _target(self, cache: ActivationCache, name: str) -> ActivationCache:
        if self.only is None:
            return self.by_name[name]
        beside = Path(cache.path).parent / name
        return ActivationCache(beside if (beside / MANIFEST).is_file() else name)

    @property
    def first(self) -> ActivationCache:
        """Any of them: a harvest's caches are of one model and one text."""
        return self.only if self.only is not None else next(iter(self.by_name.values()))


def by_layer(names: Iterable[str]) -> list[str]:
    """Names of hook points in the order of the layers."""
    return sorted(names, key=layer_order)


def spread(block: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A ``[[grid]]`` block with its caches, the first axis: those it names, of which some may be patterns, or all.

    ``names`` are the caches there are; none for a sweep on a single cache, which has no such axis.
    """
    if not names:
        if "cache" in block:
            raise UserError(
                f"cache={block['cache']!r} chooses among several caches; sweep the folder that holds them, not one"
            )
        return dict(block)
    if "target" in block and "cache" not in block:
        raise UserError(f"target={block['target']!r} needs cache = ..., the caches that transcoders read")
    wanted = block.get("cache", list(names))
    chosen = []
    for pattern in wanted if isinstance(wanted, list) else [wanted]:
        if not isinstance(pattern, str):
            raise UserError(f"cache={pattern!r} must be the name of a cache, or a pattern of names")
        found = matching(pattern, names)
        if not found:
            raise UserError(f"no cache matches {pattern!r}: {near_matches(pattern, names)}")
        chosen += found
    return {"cache": list(dict.fromkeys(chosen)), **{key: value for key, value in block.items() if key != "cache"}}


def resolve_target(keys: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The settings of one SAE with the name of its target's cache; ``*`` stands for the layer of its own cache."""
    if "target" not in keys or not names:
        return dict(keys)
    if not isinstance(keys["target"], str):
        raise UserError(f"target={keys['target']!r} must be the name of a cache")
    target = at_layer_of(keys["target"], keys["cache"])
    if target not in names:
        raise UserError(f"target={target!r} is no cache of this folder: {near_matches(target, names)}")
    return {**keys, "target": target}


def places_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is added to the names of a sweep's rows to tell its hook points apart; nothing where there is one."""
    pairs = [(row.get("hook_name"), row.get("hook_name_out")) for row in rows]
    return [f" at {out or hook}" if len(set(pairs)) > 1 else "" for hook, out in pairs]


def trained_apart(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is added to the names of a sweep's rows to tell how they were trained; nothing where all agree."""
    given = [json.loads(row.get("training") or "{}") for row in rows]
    return ["".join(f" {name}={value}" for name, value in own.items()) for own in apart(given)]


def apart(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each of several settings those in which not all agree."""
    names = [n for n in dict.fromkeys(itertools.chain(*given)) if any(o.get(n) != given[0].get(n) for o in given)]
    return [{name: own[name] for name in names if name in own} for own in given]
