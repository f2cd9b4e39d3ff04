"""Command-line options of a variant, read from its constructor, so that a new variant needs no CLI code."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

import tyro
from docstring_parser import DocstringStyle
from docstring_parser import parse as parse_docstring

from saelab.errors import UserError, near_matches
from saelab.sae import VARIANTS
from saelab.sae.options import constructors, options, with_l0


def value_of(args: Sequence[str], option: str) -> str | None:
    """The value given to ``option`` in an argument list that is not parsed yet."""
    for arg, following in zip(args, [*args[1:], None]):
        if arg == option:
            return following
        if arg.startswith(f"{option}="):
            return arg.removeprefix(f"{option}=")
    return None


def variant_in(args: Sequence[str], default: str = "topk") -> str:
    """The variant named in an argument list, before the list is parsed (its options depend on it)."""
    name = value_of(args, "--variant") or default
    if name not in VARIANTS:
        raise UserError(f"unknown variant {name!r}: {near_matches(name, VARIANTS)}")
    return name


def option_fields(variant: str) -> list[tuple[str, Any, Any]]:
    """Dataclass fields for the options of a variant, with the help of its constructors' docstrings."""
    helps: dict[str, str | None] = {}
    for constructor in constructors(VARIANTS[variant]):
        # The parser looks for sections below a first line, and getdoc() strips an empty one.
        doc = parse_docstring("\n" + (inspect.getdoc(constructor) or ""), DocstringStyle.GOOGLE)
        helps = {p.arg_name: p.description for p in doc.params} | helps
    return [
        (name, Annotated[hint, tyro.conf.arg(help=helps.get(name) or "")], field(default=default))
        for name, (hint, default) in options(VARIANTS[variant]).items()
    ]


def l0_field(variant: str) -> list[tuple[str, Any, Any]]:
    """The field of ``--l0`` for a variant that calls it otherwise; none where it is an option of its own."""
    own = VARIANTS[variant].l0_option
    if own == "l0" or own not in options(VARIANTS[variant]):
        return []
    text = f"Latents per token, as for every variant: another name of {own.replace('_', '-')}."
    return [("l0", Annotated[int | float | None, tyro.conf.arg(help=text)], field(default=None))]


def resolve_l0(chosen: Any, variant: str, args: Sequence[str]) -> Any:
    """The options ``chosen``, with ``--l0`` as the variant's own option; UserError where both differ in ``args``."""
    own = VARIANTS[variant].l0_option
    if not l0_field(variant) or chosen.l0 is None:
        return chosen
    given = any(value_of(args, f"--{name}") is not None for name in {own, own.replace("_", "-")})
    both = {own: getattr(chosen, own)} if given else {}
    return dataclasses.replace(chosen, **with_l0(VARIANTS[variant], {"l0": chosen.l0, **both}))
