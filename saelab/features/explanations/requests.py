"""Many requests to one endpoint: several at a time, each answer kept in a file, and never more than allowed.

A run that was interrupted, or that used up its requests, is continued by starting it again: what has been answered is
read from the file.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from saelab.errors import UserError
from saelab.features.explanations.client import ChatClient, Message

IN_FLIGHT = 16
T = TypeVar("T")
R = TypeVar("R")


class OutOfRequests(UserError):
    """The number of requests that was allowed has been sent."""


class KeptAnswers:
    """A :class:`ChatClient` that remembers its answers and counts its requests; it may be used by several threads.

    ``path`` is a file of one JSON object per line, ``key`` and ``answer``; a last line that is cut off, as after a
    crash, is ignored. The key covers the messages, the model and its settings. ``limit`` is the number of requests that
    may be sent; answers from the file cost none.
    """

    def __init__(self, client: ChatClient, path: Path | None = None, limit: int | None = None) -> None:
        if limit is not None and limit < 0:
            raise UserError(f"max_requests={limit} must be 0 or more")
        self.client, self.path, self.limit = client, path, limit
        self.sent = 0  # requests of this object
        self._lock = threading.Lock()
        self._known = {} if path is None else _read(path)

    def ask(self, messages: list[Message]) -> str:
        """The model's answer, from the file where it is there. Raises OutOfRequests where none may be sent."""
        key = self.key(messages)
        with self._lock:
            if key in self._known:
                return self._known[key]
            if self.limit is not None and self.sent >= self.limit:
                raise OutOfRequests(
                    f"{self.sent} requests were sent, as many as --max-requests allows; run the command again to go on "
                    "from here"
                )
            self.sent += 1
        answer = self.client.ask(messages)
        with self._lock:
            self._known[key] = answer
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "answer": answer}) + "\n")
        return answer

    def has(self, messages: list[Message]) -> bool:
        """Whether the answer is known, so that asking costs no request."""
        return self.key(messages) in self._known

    def key(self, messages: list[Message]) -> str:
        """What an answer depends on, as a hash."""
        of = [self.client.model, self.client.temperature, self.client.max_tokens, messages]
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()


Client = ChatClient | KeptAnswers


def in_parallel(function: Callable[[T], R], items: Sequence[T], in_flight: int = IN_FLIGHT) -> Iterator[tuple[int, R]]:
    """``(number, function(item))`` of every item as it is done, ``in_flight`` of them at once, in threads.

    An exception ends it: nothing more is begun, what is under way is still yielded, then the exception is raised.
    """
    if in_flight < 1:
        raise UserError(f"in_flight={in_flight} must be at least 1")
    failure: BaseException | None = None
    numbers = iter(range(len(items)))
    with ThreadPoolExecutor(in_flight, "saelab-requests") as pool:
        running: dict[Future[R], int] = {}
        while True:
            while failure is None and len(running) < in_flight and (number := next(numbers, None)) is not None:
                running[pool.submit(function, items[number])] = number
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, error = running.pop(future), future.exception()
                if error is None:
                    yield number, future.result()
                else:
                    failure = failure or error
    if failure is not None:
        raise failure


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    found = {}
    raw = path.read_bytes()
    for line in raw.splitlines():
        try:
            row = json.loads(line)
            found[str(row["key"])] = str(row["answer"])
        except (ValueError, KeyError, TypeError):
            continue  # the process was killed while it wrote the line; its question is asked again
    if raw and not raw.endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return found
