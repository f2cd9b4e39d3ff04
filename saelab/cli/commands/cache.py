"""``saelab cache``: describe, verify, merge and import activation caches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape
from rich.table import Table

from saelab.cli.console import SPINNER, console, counting, out, parse, print_json, stages
from saelab.data.cache import ActivationCache
from saelab.data.cache.importing import import_activations
from saelab.data.cache.merge import cache_summary, caches_in, merge
from saelab.errors import UserError, near_matches


@dataclasses.dataclass(frozen=True)
class Info:
    """Print what a cache holds, where it comes from, and its statistics."""

    cache: tyro.conf.Positional[str]
    """Folder or URL of a cache, or of a harvest of several hooks."""
    json: bool = False
    """Print it as JSON on stdout."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check every byte of a cache against its checksums; exit code 2 names the first damaged shard."""

    cache: tyro.conf.Positional[str]
    """Folder or URL of a cache, or of a harvest of several hooks."""
    json: bool = False
    """Print the result as JSON on stdout."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merge caches of the same hook point of the same model into a new one."""

    caches: tyro.conf.Positional[tuple[str, ...]]
    """Folders or URLs of the caches, in order."""
    out: str
    """Folder or URL of the new cache."""
    overwrite: bool = False
    """Replace an existing cache."""
    json: bool = False
    """Print a description of the new cache as JSON on stdout."""


@dataclasses.dataclass(frozen=True)
class Import:
    """Make a cache from activations that another tool stored: .npy, a dataset column, SAELens' Arrow cache."""

    source: tyro.conf.Positional[Path]
    """A .npy file, a folder written by save_to_disk, or a .parquet, .jsonl or .arrow file."""
    out: str
    """Folder or URL of the new cache."""
    column: str | None = None
    """Column with the activations; needed if several columns hold floats."""
    tokens: str | None = None
    """Column of the token ids, or the .npy file with them."""
    split: str = "train"
    """Split of a saved dataset."""
    context_length: int | None = None
    """Rows per context, where the shape of the source does not show it."""
    skip_first: int = 0
    """Positions at the start of each context to leave out (attention sinks); their text is kept."""
    model: str = ""
    """Language model the activations come from: smollm2, a folder or a hub id."""
    hook_name: Annotated[str, tyro.conf.arg(name="hook", aliases=["--hook-name"])] = ""
    """Hook point, e.g. blocks.9.hook_resid_post; by default the column's name if that is a hook point."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Precision on disk; auto keeps float16, and is float32 for everything else."""
    held_out: float = 0.05
    """Share of the contexts, from the end, kept for evaluation."""
    overwrite: bool = False
    """Replace an existing cache."""
    json: bool = False
    """Print a description of the new cache as JSON on stdout."""


ACTIONS = {"info": Info, "verify": Verify, "merge": Merge, "import": Import}


def main(args: Sequence[str]) -> None:
    """Dispatch to info, verify, merge or import."""
    if not args or args[0] in {"-h", "--help"}:
        out.print("usage: saelab cache ACTION [options]\n", markup=False)
        for name, cls in ACTIONS.items():
            out.print(f"  [bold]{name:<8}[/] {cls.__doc__}")
        return
    if args[0] not in ACTIONS:
        raise UserError(f"unknown action {args[0]!r}: {near_matches(args[0], ACTIONS)}")
    options: Any = parse(ACTIONS[args[0]], f"cache {args[0]}", args[1:], ACTIONS[args[0]].__doc__ or "")
    {"info": info, "verify": verify, "merge": join, "import": take}[args[0]](options)


def info(options: Info) -> None:
    found = [cache_summary(cache) for cache in caches_in(options.cache)]
    if options.json:
        print_json(found[0] if len(found) == 1 else found)
        return
    for description in found:
        out.print(_table(description))


def verify(options: Verify) -> None:
    caches = caches_in(options.cache)
    with stages() as progress:
        for cache in caches:
            cache.verify(progress=functools.partial(progress, cache.path))
    shards = sum(len(cache.manifest.shards) for cache in caches)
    if options.json:
        print_json({"path": options.cache, "shards": shards, "intact": True})
    else:
        out.print(f"{options.cache}: all {shards} shards are intact", markup=False)


def join(options: Merge) -> None:
    with console.status("merging", spinner=SPINNER):
        merged = merge([ActivationCache(path) for path in options.caches], options.out, overwrite=options.overwrite)
    if options.json:
        print_json(cache_summary(merged))
    else:
        out.print(_table(cache_summary(merged)))


def take(options: Import) -> None:
    given = {name: getattr(options, name) for name in ("model", "hook_name") if getattr(options, name)}
    with counting("rows") as progress:
        cache = import_activations(
            options.out,
            options.source,
            column=options.column,
            tokens=options.tokens,
            split=options.split,
            context_length=options.context_length,
            skip_first=options.skip_first,
            dtype=options.dtype,
            held_out=options.held_out,
            overwrite=options.overwrite,
            progress=progress,
            **given,
        )
    if options.json:
        print_json(cache_summary(cache))
    else:
        out.print(_table(cache_summary(cache)))


def _table(description: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in description.items():
        shown = "none" if value is None or value == {} else value
        if isinstance(value, int) and not isinstance(value, bool):
            shown = f"{value:,}"
        if name == "rows_in_neither" and value:
            shown = f"{shown} (of the context where the held-out documents begin)"
        table.add_row(f"[bold]{name}[/]", f"{shown:.6g}" if isinstance(shown, float) else escape(str(shown)))
    return table
