"""The forward passes of a stream: the text after the kept documents, begun again where it ends."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from saelab.data.packing import BEGINNING, Contexts, Packed, Place
from saelab.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spot:
    """Where a pass begins in a stream: in which reading of the text, counted from 1, and there."""

    reading: int
    place: Place


def first_pass(packed: Packed, kept: int, last_document: int, text: str) -> tuple[int, Place, bool]:
    """The first pass to train on, after ``kept`` passes that end in ``last_document``, where it begins, and whether it
    shares that document.

    The rest of that document is left out. Where it is longer than everything that is kept, both parts share it and meet
    at a context, as in a cache of one document. Raises UserError where the text ends before.
    """
    for _ in itertools.islice(packed, kept):
        pass
    begin, left = packed.place, False
    for number in range(kept, 2 * kept):
        place = packed.place
        if (batch := next(packed, None)) is None:
            break
        left = True
        if int(batch.documents.min()) > last_document:
            return number, place, False
    if not left:
        raise UserError(
            f"{text} ends before anything is left to train on, after the sample and the held-out documents; give more "
            "text, or a smaller --sample-tokens and --held-out-tokens"
        )
    _log.warning("one document of %s is longer than all that is kept: part of it is trained on", text)
    return kept, begin, True


class Passes(Iterator[Contexts]):
    """The passes of the text from number ``start`` on, and again from there, without end.

    ``packed`` gives those from a place on, and ``begin`` is the place of number ``start``; without it, as in a stream
    that an earlier version began, the text before it is tokenised too.
    """

    def __init__(self, packed: Callable[[Place], Packed], start: int, begin: Place | None, text: str) -> None:
        self._packed, self._start, self._begin, self._text = packed, start, begin, text
        self._reading, self._now = 0, None

    @property
    def spot(self) -> Spot | None:
        """Where the next pass begins, or the text ends; None before the first one."""
        return None if self._now is None else Spot(self._reading, self._now.place)

    def go(self, spot: Spot) -> None:
        """Continue from there."""
        if spot.reading > 1 >= self._reading:
            self._say_again()
        self._reading, self._now = spot.reading, self._packed(spot.place)

    def __next__(self) -> Contexts:
        while self._now is None or (batch := next(self._now, None)) is None:
            self._reading += 1
            if self._reading == 2:
                self._say_again()
            self._now = self._packed(self._begin or BEGINNING)
            if self._begin is None:
                for _ in itertools.islice(self._now, self._start):
                    pass
                self._begin = self._now.place
        return batch

    def _say_again(self) -> None:
        _log.warning("%s has ended and is begun again", self._text)


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
