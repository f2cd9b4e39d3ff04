"""The one exception for mistakes a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, stated in one line with its remedy.

    The command line prints the message without a traceback and leaves with exit code 2.
    """


def near_matches(name: str, known: Iterable[str], limit: int = 5) -> str:
    """A clause that names the known words closest to ``name``, or lists the first of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known[:limit])}"
