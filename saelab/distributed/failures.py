"""When a process of a run fails: the others end too, and one line says which one it was and why.

Processes that torchrun started meet in its store, which outlives each of them. What they leave there is a few bytes.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from saelab.errors import UserError, first_line

GRACE = 3.0  # seconds in which a process that still runs reports that it has lost another one, too
SIGNS = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe")
_SAID, _CLAIMS, _WAITING, _GO_ON = "saelab/error", "saelab/errors", "saelab/waiting", "saelab/go-on"


class LostProcess(UserError):
    """Another process of the run has ended or does not answer; the message names it."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


_lost = False
_token: str | None = None  # of this start of the processes


def is_lost() -> bool:
    """Whether this process has lost another one, so that nothing can be exchanged any more."""
    return _lost


@contextmanager
def naming_lost() -> Iterator[None]:
    """Inside the block an exchange that fails because of another process raises :class:`LostProcess`."""
    global _lost
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not _of_an_exchange(error):
            raise
        _lost = True
        raise LostProcess(_lost_message(error)) from error


def says_error(text: str, lost: bool) -> bool:
    """Whether this process shall print an error: the first one that asks does.

    Others do so only if theirs is another one, and no consequence of the first, as ``lost`` says.
    """
    store = _store()
    if store is None:
        return True
    try:
        if store.add(_CLAIMS, 1) == 1:
            store.set(_SAID, text)
            return True
        return not lost and store.get(_SAID).decode() != text
    except RuntimeError:  # the launcher is gone
        return True


def _of_an_exchange(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in SIGNS)


def _lost_message(error: RuntimeError) -> str:
    """Which processes do not answer, in one line."""
    world, missing = dist.get_world_size(), _missing()
    who = "another process" if not missing else f"process {', '.join(map(str, missing))}"
    return (
        f"{who} of {world} has ended or does not answer ({first_line(error)}); look for its own message, "
        "and continue with --resume"
    )


def _missing() -> list[int]:
    """The processes that have not reported, within ``GRACE``, that they wait for others."""
    store = _store()
    if store is None:
        return []
    rank, others = dist.get_rank(), {n for n in range(dist.get_world_size()) if n != dist.get_rank()}
    try:
        store.set(f"{_WAITING}/{rank}", "")
        end = time.monotonic() + GRACE
        while others and time.monotonic() < end:
            others = {n for n in others if not store.check([f"{_WAITING}/{n}"])}
            time.sleep(0.05)
    except RuntimeError:
        return []
    return sorted(others)


def _store() -> Any:
    """The part of the store of torchrun's agent that only this start of the processes uses; None without an agent."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
    except RuntimeError:
        return None
    return dist.PrefixStore(_token or f"saelab/start/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)


def on_one_machine() -> bool:
    """Whether torchrun started all processes of the run on this machine."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return agent and os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started."""
    return os.environ.get("RANK") == "0"


def let_others_go_on() -> None:
    """Ends :func:`wait_for_first` in the other processes."""
    if (store := _store()) is None:
        raise LostProcess("torchrun does not answer; start it again")
    store.set(_GO_ON, "")


def wait_for_first() -> None:
    """Return once the first process has called :func:`let_others_go_on`; where it fails, torchrun ends this one."""
    store = _store()
    try:
        while store is not None and not store.check([_GO_ON]):
            time.sleep(0.1)
    except RuntimeError:
        store = None
    if store is None:
        raise LostProcess("torchrun does not answer; start it again")


def meet(timeout_s: float) -> dict[str, Any]:
    """Arguments of ``init_process_group`` with which the processes of one start meet, and none of an earlier one.

    torchrun may keep its store when it starts processes again, and with it the addresses of those that have died, to
    which the new ones would connect. So they agree on a new part of the store first: each asks the first process for
    its name with a number of its own, and is answered by that number.
    """
    global _token
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    if rank:
        asked = secrets.token_hex(8)
        store.set(f"saelab/asks/{rank}", asked)
        token = store.get(f"saelab/answer/{asked}").decode()
        store.set(f"{token}/has/{rank}", "")
    else:
        token = f"saelab/{secrets.token_hex(8)}"
        _answer(store, token, size, time.monotonic() + timeout_s)
    _token = token
    return {"store": dist.PrefixStore(token, store), "rank": rank, "world_size": size}


def _answer(store: Any, token: str, size: int, end: float) -> None:
    """Tell all other processes the token. What one of an earlier start has asked is answered, too, and not heard."""
    waiting = set(range(1, size))
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"{token}/has/{rank}"]):
                waiting.remove(rank)
            elif store.check([f"saelab/asks/{rank}"]):
                store.set(f"saelab/answer/{store.get(f'saelab/asks/{rank}').decode()}", token)
        if waiting and time.monotonic() > end:
            raise LostProcess(f"process {', '.join(map(str, sorted(waiting)))} of {size} has not started")
        time.sleep(0.01)
