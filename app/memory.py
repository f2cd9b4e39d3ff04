"""Garbage collection that leaves out what stays.

Streamlit collects all garbage each time a page was drawn. That goes through every object of the process, and the
packages alone have so many that it took two thirds of the server's time. They are never garbage.
"""

from __future__ import annotations

import atexit
import gc

LAST = "last"
_kept: set[str] = set()


def keep(stage: str, last: bool = False) -> None:
    """Leave all objects that there are now out of later collections; once per ``stage`` of the process.

    What is left out is not found when it becomes a ring of garbage. So the ``last`` stage is before a language model is
    loaded, which another may replace; after it none does anything.
    """
    if stage in _kept or LAST in _kept:
        return
    _kept.update({stage, LAST} if last else {stage})
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # some packages complain of what is left when the process ends
