"""The thread behind a harvest: order, errors, and that the model does not run ahead without bound."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from saelab.harvesting.background import DEPTH, Background, Beside


def test_work_is_done_in_order_and_waited_for() -> None:
    done: list[int] = []
    with closing(Background()) as background:
        for number in range(50):
            background.submit(lambda number=number: done.append(number))
        background.drain()
        assert done == [*range(50)]
    assert not Background.active


def test_no_more_than_a_few_pieces_wait() -> None:
    gate, done = threading.Event(), []
    with closing(Background()) as background:
        background.submit(lambda: gate.wait(60) and None)
        feeder = threading.Thread(target=lambda: [background.submit(lambda: done.append(1)) for _ in range(DEPTH + 1)])
        feeder.start()
        feeder.join(0.3)
        assert feeder.is_alive() and not done  # the model would wait here
        gate.set()
        feeder.join(60)
        background.drain()
    assert len(done) == DEPTH + 1


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_an_error_is_raised_by_the_next_call_and_what_follows_is_dropped(kind: type[BaseException]) -> None:
    done: list[int] = []

    def broken() -> None:
        raise kind("full")

    with closing(Background()) as background, pytest.raises(kind, match="full"):
        background.submit(broken)
        background.submit(lambda: done.append(1))
        background.drain()
    assert not done and threading.current_thread() is threading.main_thread()
    assert not [thread for thread in threading.enumerate() if thread.name == "saelab-harvest"]


def test_a_device_without_streams_needs_none() -> None:
    beside = Beside()
    with beside.after(beside.made([])):
        pass
