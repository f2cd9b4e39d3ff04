"""The one exception for mistakes a user can mend."""

from __future__ import annotations

import contextlib
import difflib
import struct
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Bad input, stated in one line with its remedy.

    The command line prints the message without a traceback and leaves with exit code 2.
    """


# What reading stumbles over when a file does not hold what its format promises.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, struct.error)


@contextlib.contextmanager
def damaged(where: object, remedy: str, *also: type[Exception]) -> Iterator[None]:
    """Whatever reading the file ``where`` stumbles over in this block is said in one line that names it.

    ``also`` are exceptions of libraries that have no common base.
    """
    try:
        yield
    except UserError:
        raise
    except (*MALFORMED, *also) as error:
        raise UserError(f"{where} is damaged ({first_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message that stays on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def near_matches(name: str, known: Iterable[str], limit: int = 5) -> str:
    """A clause that names the known words closest to ``name``, or lists the first of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known[:limit])}"
