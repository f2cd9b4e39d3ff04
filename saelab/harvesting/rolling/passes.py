"""The forward passes of a stream: the text after the kept documents, begun again where it ends."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

from jaxtyping import Bool
from torch import Tensor

from saelab.data.packing import Contexts
from saelab.errors import UserError

_log = logging.getLogger(__name__)


def first_pass(packed: Iterator[Contexts], kept: int, last_document: int, text: str) -> tuple[int, bool]:
    """The first pass to train on, after ``kept`` passes that end in ``last_document``, and whether it shares it.

    The rest of that document is left out. Where it is longer than everything that is kept, both parts share it and meet
    at a context, as in a cache of one document. Raises UserError where the text ends before.
    """
    left = False
    for number, batch in enumerate(itertools.islice(packed, kept, 2 * kept), kept):
        left = True
        if int(batch.documents.min()) > last_document:
            return number, False
    if not left:
        raise UserError(
            f"{text} ends before anything is left to train on, after the sample and the held-out documents; give more "
            "text, or a smaller --sample-tokens and --held-out-tokens"
        )
    _log.warning("one document of %s is longer than all that is kept: part of it is trained on", text)
    return kept, True


class Passes:
    """The passes of the text from number ``start`` on, and again from there, without end."""

    def __init__(self, packed: Callable[[], Iterator[Contexts]], start: int, text: str) -> None:
        self._packed, self._start, self._text = packed, start, text
        self.readings = 0  # that have begun

    def __iter__(self) -> Iterator[Contexts]:
        while True:
            self.readings += 1
            if self.readings == 2:
                _log.warning("%s has ended and is begun again", self._text)
            yield from itertools.islice(self._packed(), self._start, None)


class Planned:
    """The next passes for one segment: at most ``most``, and no more than give ``rows`` rows.

    ``keep`` tells of each role whether its tokens get rows. What is left out by its norm is not known before the model
    has run; a segment with fewer rows than planned is followed by one more.
    """

    def __init__(self, passes: Iterator[Contexts], most: int, rows: int, keep: Bool[Tensor, " roles"], skip: int):
        self._passes, self._most, self._wanted, self._keep, self._skip = passes, most, rows, keep, skip
        self.passes = self.rows = 0  # so far
        self.total: int | None = None  # passes, once the last one is known

    def __iter__(self) -> Iterator[Contexts]:
        while self.total is None:
            batch = next(self._passes)
            self.passes += 1
            self.rows += int(self._keep[batch.roles][:, self._skip :].sum())
            if self.passes == self._most or self.rows >= self._wanted:
                self.total = self.passes
            yield batch
