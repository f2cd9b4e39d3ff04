"""Garbage collection that leaves out what stays.

Streamlit collects all garbage each time a page was drawn. That goes through every object of the process, and the
packages alone have so many that it took two thirds of the server's time. They are never garbage.
"""

from __future__ import annotations

import atexit
import functools
import gc


@functools.cache
def keep(stage: str) -> None:
    """Leave all objects that there are now out of later collections; once per ``stage`` of the process.

    Not to be called where a language model or other large objects of a user are loaded: what is left out is not found
    when it becomes a ring of garbage.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # some packages complain of what is left when the process ends
