"""What all benchmarks share as commands: options that are checked before anything is measured, an end in one line."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from saelab.errors import UserError

T = TypeVar("T")
FROM_ZERO = {"layer", "layers", "lm_tokens", "seed"}  # the other numbers are counts, sizes and limits: above zero
SHAPES = {"shape", "pursuit"}
INPUTS = {"run", "runs", "cache", "caches", "keys", "peers_python"}  # where they are paths on this machine


class Shape(NamedTuple):
    """Sizes of a step: tokens, width, latents, latents per token."""

    n: int
    d_in: int
    d_sae: int
    k: int


def shape_of(text: str) -> Shape:
    """The sizes that ``n x d_in x d_sae x k`` names, as in 2048x576x16384x32."""
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{text!r} is no shape; give tokens x width x latents x k, such as 2048x576x16384x32")
    shape = Shape(*map(int, parts))
    if shape.k > shape.d_sae:
        raise UserError(f"the shape {text} asks for {shape.k} of {shape.d_sae} latents per token; give a smaller k")
    return shape


def options(cls: type[T], name: str, description: str | None, args: Sequence[str] | None) -> T:
    """The options of ``saelab.bench.NAME``, parsed and checked; ``threads`` among them takes effect."""
    import tyro

    from saelab.kernels import dispatch

    found = tyro.cli(cls, prog=f"python -m saelab.bench.{name}", description=description, args=args)
    for field in dataclasses.fields(found):  # pyright: ignore[reportArgumentType]
        _check(field, getattr(found, field.name))
    if reason := dispatch.refusal("cuda" if torch.cuda.is_available() else "cpu"):
        raise UserError(f"{dispatch.VARIABLE}: {reason}; unset it")
    if (threads := getattr(found, "threads", None)) is not None:
        torch.set_num_threads(threads)
    return found


def run(main: Callable[[], object]) -> None:
    """Run ``main`` as the process: errors of input and of the operating system end it with one line, as in saelab."""
    from saelab.cli import orderly

    with orderly():
        status = main()
        if isinstance(status, int):
            sys.exit(status)


def check_out(path: Path) -> None:
    """Refuse a result file that could not be written after all the work."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}; make it first, or name another file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--out {path}: nothing can be written in {path.parent}; name a file elsewhere")


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    from saelab.errors import near_matches
    from saelab.sae import VARIANTS

    option = f"--{field.name.replace('_', '-')}"
    if value == () and field.default != ():
        raise UserError(f"{option} names nothing; give at least one")
    values: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    for each in values:
        if _is_number(each):
            if not math.isfinite(each) or each < 0 or (each == 0 and field.name not in FROM_ZERO):
                least = "at least 0" if field.name in FROM_ZERO else "above 0"
                raise UserError(f"{option} {each} must be a number {least}")
        elif field.name in SHAPES and each:
            shape_of(each)
        elif field.name in ("variant", "variants") and each not in VARIANTS:
            raise UserError(f"unknown variant {each!r}: {near_matches(each, VARIANTS)}")
        elif field.name in INPUTS and _is_missing(each):
            raise UserError(f"{each} does not exist; check the path")
        elif field.name == "out" and each is not None:
            check_out(each)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_missing(value: Any) -> bool:
    return isinstance(value, Path) and not value.exists()
