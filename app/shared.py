"""What sessions share: results that are kept for a while, and the turn of using the model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import streamlit as st


class Recent:
    """The last few results that sessions share; they must not be changed."""

    def __init__(self, most: int) -> None:
        self._most, self._kept, self._lock = most, OrderedDict[Any, Any](), threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, key: Any, value: Any) -> Any:
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return value


class ModelLock:
    """The lock to hold while running the shared model, because hooks are state of the model. Waiting is shown."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            with st.spinner("Waiting for the language model, which another tab is using …"):
                self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def turn(self) -> Iterator[ModelLock]:
        """Hold it in a thread that draws no page."""
        with self._lock:
            yield self

    def pass_on(self) -> None:
        """Let go of it for a moment, for whoever waits; the model must carry no hooks."""
        self._lock.release()
        time.sleep(0.005)
        self._lock.acquire()
