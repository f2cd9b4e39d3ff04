"""The grid of a sweep: a TOML file whose lists are multiplied out, checked before anything trains.

[train]                       # training options that all SAEs share; see `saelab train --help`
epochs = 4
batch_size = 2048

[[grid]]                      # lists are multiplied out; as many blocks as needed
variant = ["topk", "abs_topk"]
d_sae = 4608
k = [16, 32, 64]
seed = [0, 1]

[[grid]]
variant = ["topk", "jump_relu", "gated"]
d_sae = 4608
l0 = [16, 32]                 # latents per token of every variant: k where there is a budget

[[grid]]
variant = "matryoshka"
d_sae = 4608
groups = [[0.25, 0.75], [0.5, 0.5]]   # where one value is a list, a list of lists

[[grid]]
variant = "batch_topk"
d_sae = 4608
k = 32
lr = [2e-4, 4e-4]

[[grid]]
variant = ["topk", "matching_pursuit"]
d_sae = 4608
l0 = 32
lr = "tune"                   # the best of several on validation rows; { tune = [5e-4, 1e-3, 2e-3] } names them
seed = [0, 1, 2]              # tuned with the first seed

[[grid]]                      # of a folder of caches: these of them (all by default) are one more axis
cache = ["blocks.*.hook_resid_post"]
variant = "topk"
d_sae = 4608
l0 = 32

[[grid]]                      # transcoders: * is the layer of the cache
cache = ["blocks.0-29.mlp.hook_in"]
target = "blocks.*.hook_mlp_out"
variant = "topk"
d_sae = 4608
l0 = 32
skip = true

[tune]                        # optional: these are the defaults
factors = [0.25, 0.5, 1, 2, 4]  # rates to try, as multiples of the default rate
validation = 0.05             # share of the training contexts
stop_early = true             # stop rates that are far behind

[halving]                     # optional: stop the worse SAEs of each group early
at = [0.25, 0.5]              # shares of the steps
keep = 0.5                    # share of a group that continues
within = ["k"]                # SAEs that agree in these keys form a group
"""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, first_line, near_matches
from saelab.sae import SAE, VARIANTS, build
from saelab.sae.options import defaults, with_l0
from saelab.sae.options import options as variant_options
from saelab.sweep.caches import Caches, Pair, resolve_target, spread
from saelab.sweep.tuning import Tuning, rates_of
from saelab.training import TrainConfig, check
from saelab.training.config import target_width

# Settings that all SAEs of a sweep share, because they see the same batches.
SHARED = ("epochs", "batch_size", "data_seed")
AXES = ("cache", "target", "variant", "d_sae")  # keys that are no options of a variant
TABLES = ("train", "grid", "halving", "tune")
TRAIN = tuple(field.name for field in fields(TrainConfig))
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Entry:
    """One SAE of a sweep. ``name`` is its folder; ``keys`` are what the grid says about it."""

    name: str
    variant: str
    d_sae: int
    options: dict[str, Any]  # of the variant
    train: TrainConfig
    keys: dict[str, Any]
    rates: tuple[float, ...] | None = None  # learning rates to choose from, () for multiples of the default; else None

    @property
    def pair(self) -> Pair:
        """Names of its cache and its target."""
        return self.keys.get("cache", ""), self.keys.get("target", "")

    @property
    def l0(self) -> float | None:
        """Active latents per token that were asked for; None where a penalty has a weight instead."""
        cls = VARIANTS[self.variant]
        return self.options.get(cls.l0_option, defaults(cls).get(cls.l0_option))

    @property
    def training(self) -> dict[str, Any]:
        """What else than the seed tells its training from that of another SAE with default options.

        The rate is only told where the grid lists it: one that is computed or tuned differs between SAEs of other
        widths and L0, which are compared all the same.
        """
        given, default = asdict(self.train), asdict(TrainConfig())
        left_out = ("seed", *SHARED) if isinstance(self.keys.get("lr"), int | float) else ("lr", "seed", *SHARED)
        return {n: given[n] for n in TRAIN if n not in left_out and given[n] != default[n]}

    def build(self, d_in: int, d_out: int | None = None) -> SAE:
        """The untrained SAE: the one that `saelab train` with the same options starts from. ``d_out`` is the target's
        width."""
        torch.manual_seed(self.train.seed)
        target = {} if d_out is None else {"d_out": d_out}
        return build(self.variant, d_in=d_in, d_sae=self.d_sae, **{**self.options, **target})

    def outline(self, d_in: int, d_out: int | None = None) -> SAE:
        """The same SAE without memory for its weights."""
        with torch.device("meta"):
            return self.build(d_in, d_out)

    def sizes(self, cache: ActivationCache) -> tuple[int, int | None]:
        """``d_in`` and ``d_out`` on a cache; UserError for a target of another width than the input's or its own."""
        return cache.d_in, target_width(cache, self.options.get("d_out"))

    def keys_but(self, name: str) -> str:
        """What the grid says about the SAE, but for one key, as text to compare."""
        return json.dumps({key: value for key, value in self.keys.items() if key != name}, sort_keys=True)


@dataclass(frozen=True)
class Halving:
    """Successive halving: at each share of the steps in ``at``, the best ``keep`` of every group continue.

    SAEs are compared by the mean training FVU of the last steps, within groups that agree in the keys ``within``.
    """

    at: tuple[float, ...]
    keep: float = 0.5
    within: tuple[str, ...] = ("k",)

    def __post_init__(self) -> None:
        if not self.at or any(not 0 < share < 1 for share in self.at) or list(self.at) != sorted(set(self.at)):
            raise UserError(f"halving: at={list(self.at)} must be increasing shares of the steps between 0 and 1")
        if not 0 < self.keep < 1:
            raise UserError(f"halving: keep={self.keep} must lie between 0 and 1")


@dataclass(frozen=True)
class Grid:
    """The SAEs of a sweep, in order, and whether the worse ones are stopped early."""

    entries: tuple[Entry, ...]
    halving: Halving | None = None
    tuning: Tuning | None = None  # None where no entry's learning rate is tuned

    def content(self) -> dict[str, Any]:
        """The grid as JSON, to recognise it again; without tuning it has the form of version 0.1.0."""
        entries = [asdict(entry) for entry in self.entries]
        for entry in entries:
            if entry["rates"] is None:
                del entry["rates"]
            if entry["train"]["precision"] == "auto":
                entry["train"]["precision"] = "fp32"  # the default of 0.1.0; the runs record what they computed in
            for name, value in (("moments", "fp32"), ("freeze", "none"), ("aux_gradient", "rectified")):
                if entry["train"][name] == value:
                    del entry["train"][name]  # there was no other in 0.1.0
        tuning = {} if self.tuning is None else {"tuning": asdict(self.tuning)}
        return {"entries": entries, "halving": None if self.halving is None else asdict(self.halving), **tuning}

    def parts(self) -> dict[Pair, Grid]:
        """The same grid for each cache and target that its SAEs have; they train one after the other."""
        found: dict[Pair, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.pair, []).append(entry)
        return {pair: replace(self, entries=tuple(entries)) for pair, entries in found.items()}

    def first_reading(self) -> int:
        """How many SAEs train at first: all, but of those whose rate is tuned one seed at every rate."""
        factors = () if self.tuning is None else self.tuning.factors
        tuned = {e.keys_but("seed"): len(e.rates or factors) for e in self.entries if e.rates is not None}
        return sum(tuned.values()) + sum(entry.rates is None for entry in self.entries)

    def view(self, cache: ActivationCache) -> ActivationCache:
        """``cache`` as all SAEs of this grid see it: where rates are tuned, with validation rows set apart."""
        return cache if self.tuning is None else cache.with_validation(self.tuning.validation)


def read_grid(path: Path | str, caches: Sequence[str] = (), assumed: Mapping[str, Any] | None = None) -> Grid:
    """Parse a grid file; see :func:`make_grid`. Raises UserError if it is not one."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the grid {path} ({error.strerror}); name a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML ({first_line(error)}); correct it") from error
    try:
        return make_grid(content, caches, assumed)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def make_grid(content: Mapping[str, Any], caches: Sequence[str] = (), assumed: Mapping[str, Any] | None = None) -> Grid:
    """A grid from the content of a grid file.

    ``caches`` are the names of several caches, which are one more axis; ``assumed`` holds where [train] is silent.
    """
    for name in content:
        if name not in TABLES:
            raise UserError(f"unknown table [{name}] in the grid: {near_matches(name, TABLES)}")
    blocks = content.get("grid")
    if not isinstance(blocks, list) or not blocks:
        raise UserError("the grid has no [[grid]] block; add one with at least a variant and d_sae")
    for block in blocks:
        _table(block, "[[grid]]")
    shared = {**(assumed or {}), **_table(content.get("train", {}), "[train]")}
    _known(shared, TRAIN, "[train]")
    product = [keys for block in blocks for keys in _product(spread(block, caches))]
    combinations = [resolve_target(keys, caches) for keys in product]
    varying = [key for key in dict.fromkeys(itertools.chain(*combinations)) if _varies(key, combinations)]
    entries = tuple(_entry(i, keys, shared, varying) for i, keys in enumerate(combinations, 1))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the grid lists {name} {names.count(name)} times; remove the duplicate")
    tuned = any(entry.rates is not None for entry in entries)
    if "halving" in content and tuned:
        raise UserError('[halving] and lr = "tune" both stop SAEs early; use one of them')
    if "tune" in content and not tuned:
        raise UserError('[tune] has no effect, since no lr is "tune"; write lr = "tune" or remove it')
    halving = _settings(content, "halving", Halving, ("at",)) if "halving" in content else None
    tuning = _settings(content, "tune", Tuning) if tuned else None
    return Grid(entries, halving, tuning)


def _settings(content: Mapping[str, Any], name: str, cls: type, required: Sequence[str] = ()) -> Any:
    """The table ``[name]`` as an object."""
    table, where = _table(content.get(name, {}), f"[{name}]"), f"[{name}]"
    _known(table, [field.name for field in fields(cls)], where)
    for key in required:
        if key not in table:
            raise UserError(f"{where} needs {key} = [...], the shares of the steps at which to stop the worse SAEs")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    _check_types(values, get_type_hints(cls), f"{where}: ")
    return cls(**values)


def check_grid(grid: Grid, caches: Caches | ActivationCache | Mapping[str, ActivationCache]) -> None:
    """Raise UserError for the first entry that cannot be trained on its cache, by name; nothing is allocated.

    Validation rows must fill a batch where rates are tuned: fewer do not tell neighbouring rates apart.
    """
    opened = Caches.of(caches)
    for pair, part in grid.parts().items():
        _check_part(part, opened.get(pair))


def _check_part(grid: Grid, cache: ActivationCache) -> None:
    cache = grid.view(cache)
    rows, size = cache.n_split("validation"), grid.entries[0].train.batch_size
    if grid.tuning is not None and rows < size:
        found = f"validation={grid.tuning.validation} gives {rows} validation rows, fewer than a batch of {size}"
        raise UserError(f"{found}; raise it in [tune], lower batch_size or harvest more tokens")
    for number, entry in enumerate(grid.entries, 1):
        try:
            check(entry.outline(*entry.sizes(cache)), cache, entry.train)
        except UserError as error:
            raise _blame(number, entry.keys, error) from error


def _entry(number: int, keys: dict[str, Any], shared: Mapping[str, Any], varying: Sequence[str]) -> Entry:
    for required in ("variant", "d_sae"):
        if required not in keys:
            raise _blame(number, keys, f"it has no {required}")
    for name in SHARED:
        if name in keys:
            raise _blame(number, keys, f"{name} is shared by all SAEs of a sweep; put it under [train]")
    own = {name: value for name, value in keys.items() if name in TRAIN}
    training = {**shared, **own}
    options = {name: value for name, value in keys.items() if name not in {*TRAIN, *AXES}}
    try:
        rates = rates_of(training.get("lr"))
        if rates is not None:
            del training["lr"]
        _check_types({"d_sae": keys["d_sae"], **training}, {"d_sae": int, **get_type_hints(TrainConfig)})
        if keys["variant"] in VARIANTS:  # another one is refused where the SAE is built
            cls = VARIANTS[keys["variant"]]
            known, options = variant_options(cls), with_l0(cls, options)
            _check_types(options, {name: hint for name, (hint, _) in known.items()})
            if rates is not None and cls.l0_option == "l0" and options.get("l0") is None:
                raise UserError("rates are tuned at equal L0, since fewer active latents raise FVU; give it an l0")
        train = TrainConfig(**training)
    except UserError as error:
        raise _blame(number, keys, error) from error
    named = [
        key
        for key in ("cache", "variant", "l0", "k", "d_sae", "lr", "seed")
        if key in keys and (key in varying or key == "variant")
    ]
    named += [key for key in keys if key in varying and key not in named]
    name = "_".join(_word(keys[key]) if key in ("cache", "variant") else f"{key}-{_word(keys[key])}" for key in named)
    return Entry(name, keys["variant"], keys["d_sae"], options, train, keys, rates)


def _blame(number: int, keys: Mapping[str, Any], error: object) -> UserError:
    settings = ", ".join(f"{name}={value}" for name, value in keys.items())
    return UserError(f"entry {number} of the grid ({settings}): {error}")


def _product(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = {name: value if isinstance(value, list) else [value] for name, value in block.items()}
    for name, values in lists.items():
        if not values:
            raise UserError(f"{name} = [] in a [[grid]] block leaves nothing to train; give it a value")
    return [dict(zip(lists, values)) for values in itertools.product(*lists.values())]


def _varies(key: str, combinations: Sequence[Mapping[str, Any]]) -> bool:
    return any(keys.get(key) != combinations[0].get(key) for keys in combinations)


def _word(value: Any) -> str:
    if isinstance(value, Mapping):  # { tune = [...] }
        return "-".join([*value, *(f"{_word(item)}" for items in value.values() for item in items)])
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return "".join(c if c.isalnum() or c in "._-+" else "-" for c in str(value))


def _table(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be a table of settings, not {value!r}")
    return value


def _check_types(values: Mapping[str, Any], hints: Mapping[str, Any], where: str = "") -> None:
    """Refuse a value that an option cannot have; the command line does so for its own."""
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{where}{name}={value!r} must be {_words(hints[name])}")


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in {Union, UnionType}:
        return " or ".join(_words(one) for one in inner if one is not int or float not in inner)
    if origin is not None:
        return "a list (a list of lists under [[grid]], where lists are multiplied out)"
    return WORDS.get(hint, str(hint))


def _fits(value: Any, hint: Any) -> bool:
    # beartype looks at one item of a list only, and a library that looks at all takes True for a number.
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in {Union, UnionType}:
        return any(_fits(value, one) for one in inner)
    if origin is not None:
        return isinstance(value, origin) and all(_fits(one, inner[0]) for one in value)
    if hint in {int, float}:
        # An integer is accepted for a float, and True is not a number.
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _known(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in table:
        if name not in known:
            raise UserError(f"unknown key {name!r} in {where}: {near_matches(name, known)}")
