"""What the commands share: parsing, output folders, progress bars, machine-readable output."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from saelab.errors import UserError
from saelab.files import LOCK, lock, refuse_url

T = TypeVar("T")
# Progress and remarks go to stderr, results to stdout, so that --json can be piped.
console = Console(stderr=True, highlight=False)
out = Console(highlight=False)
# The dots that turn are not in every console's encoding.
SPINNER = "dots" if console.encoding.startswith("utf") else "line"


def parse(
    options: Callable[..., T] | type[T],
    command: str,
    args: Sequence[str],
    description: str = "",
    default: T | None = None,
) -> T:
    """Parse ``args`` into ``options`` (a dataclass or a function); exits with code 2 on a wrong argument.

    ``default`` replaces the defaults of the fields; where it holds ``tyro.MISSING`` the argument is required.
    """
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    with _first_speaks():
        found = tyro.cli(
            options, prog=f"saelab {command}", args=list(args), description=description or None, **keywords
        )
    if isinstance(place := getattr(found, "out", None), Path):  # a command that writes to stores takes text
        refuse_url(place)
    return found


@contextlib.contextmanager
def _first_speaks() -> Iterator[None]:
    """Of several processes with the same arguments, started by torchrun, the first says what is wrong with them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        except SystemExit:
            time.sleep(10)  # torchrun ends this process as soon as the first has ended
            raise


def with_local_run(options: T) -> T:
    """The options with the local copy of a run that lies behind a URL."""
    from saelab.copies import fetched

    copy = fetched(options.run)  # pyright: ignore[reportAttributeAccessIssue]
    return options if copy is None else dataclasses.replace(options, run=copy)  # pyright: ignore[reportArgumentType]


def part(cls: type[T], options: Any) -> T:
    """The fields of the dataclass ``cls``, taken from options that hold more."""
    return cls(**{f.name: getattr(options, f.name) for f in dataclasses.fields(cls)})  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def output_folder(
    folder: Path, overwrite: bool, resume: bool, marks: Sequence[str], inputs: Sequence[object] = ()
) -> Iterator[None]:
    """An output folder that no other process writes while the block lasts.

    A folder that is not empty needs ``--resume``, or ``--overwrite``, which empties it: see :func:`check_output`.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder")
    with lock(folder):
        check_output(folder, overwrite, resume, marks, inputs)
        # The folder itself stays, since it is locked.
        for path in [] if resume else [path for path in folder.iterdir() if path.name != LOCK]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield


def check_output(
    folder: Path, overwrite: bool, resume: bool, marks: Sequence[str], inputs: Sequence[object] = ()
) -> None:
    """Refuse an output folder that holds something, unless that shall be replaced or continued.

    What is replaced was written by the same command, which is told by a file with one of the names ``marks``, and holds
    none of the paths ``inputs``, which the command reads.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder")
    found = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if not found or resume:
        return
    if not any((folder / name).exists() for name in marks):
        raise UserError(
            f"{folder} exists and holds no {' or '.join(marks)} of an earlier run: it stays; name another folder"
        )
    if not overwrite:
        raise UserError(f"{folder} exists; add --overwrite to replace it, --resume to continue, or name another")
    paths = map(Path, filter(None, map(str, inputs)))
    within = [path for path in paths if path.resolve().is_relative_to(folder.resolve())]
    if within:
        raise UserError(f"{folder} holds {within[0]}, which is read: it is not replaced; name another folder")


def quiet(yes: bool) -> None:
    """Print errors only; for all but one of several processes that do the same work."""
    console.quiet = out.quiet = yes


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    if out.quiet:
        return
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def progress_bar(*extra: str) -> Progress:
    """A progress bar on stderr; ``extra`` names task fields shown behind it."""
    fields = [TextColumn("{task.fields[" + name + "]}") for name in extra]
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *fields,
        TimeRemainingColumn(),
        console=console,
    )


@contextlib.contextmanager
def live_view() -> Iterator[Live]:
    """A live display on stderr, with a line break at its end, which rich leaves out in a file."""
    try:
        with Live(console=console, refresh_per_second=2) as live:
            yield live
    finally:
        if not console.is_interactive:
            console.print()


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for one piece of work; yields the function that advances it: ``(done, total)``."""
    with stages() as move:
        yield lambda done, total: move(what, done, total)


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar per stage, shown when it begins; yields the function that advances them:
    ``(stage, done, total)``."""
    with progress_bar() as bar:
        tasks: dict[str, TaskID] = {}

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield move
