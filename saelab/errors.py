"""The exceptions for invalid input and for a stop, and helpers that phrase its message."""

from __future__ import annotations

import contextlib
import difflib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin


class UserError(ValueError):
    """Invalid input. The message is one line and says what to do.

    The commands print the message without a traceback and exit with code 2.
    """


class Stopped(Exception):
    """The caller asked to stop while something else was waited for."""


# Raised by parsers when the content of a file does not fit its format.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, struct.error)


@contextlib.contextmanager
def damaged(where: object, remedy: str, *also: type[Exception]) -> Iterator[None]:
    """Turn any parsing error in this block into a UserError that names the file ``where`` and says ``remedy``.

    ``also`` lists further exceptions to convert, such as those of a library.
    """
    try:
        yield
    except UserError:
        raise
    except (*MALFORMED, *also) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{where} cannot be read ({error.strerror}); {remedy}") from error
        raise UserError(f"{where} is damaged ({first_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message that stays on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def near_matches(name: str, known: Iterable[str], limit: int = 5) -> str:
    """A clause that names the known words closest to ``name``, or lists the first of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known[:limit])}"


def check_choices(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise UserError for a value that is none of the words of its ``Literal`` in ``hints``.

    Code that asks which word it is takes any other for one of them, and would do what nobody asked for.
    """
    for name, hint in hints.items():
        if get_origin(hint) is Literal and name in values and values[name] not in get_args(hint):
            raise UserError(f"{name}={values[name]!r} is not one of {', '.join(map(str, get_args(hint)))}")
