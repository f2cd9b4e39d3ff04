"""What processes agree on, and which of them speaks when something fails; without processes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

from saelab.cli import report
from saelab.cli.console import parse
from saelab.distributed import SINGLE, Parallel, Poll, failures, start_world, world
from saelab.distributed.failures import LostProcess, naming_lost
from saelab.errors import UserError


class Store(dict):
    """The store of torchrun's agent, in memory."""

    def add(self, key: str, amount: int) -> int:
        self[key] = self.get_(key, 0) + amount
        return self[key]

    def set(self, key: str, text: str) -> None:
        self[key] = text.encode()

    def get(self, key: str) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def get_(self, key: str, default: int) -> int:
        return super().get(key, default)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    monkeypatch.setattr(failures, "_store", lambda: found)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    return found


def test_one_process_prints_an_error_that_all_have(store: Store, capsys: pytest.CaptureFixture) -> None:
    for error in (UserError("too wide"), UserError("too wide"), LostProcess("process 0 is gone"), UserError("no file")):
        report(error)
    assert capsys.readouterr().err.splitlines() == ["error: too wide", "error: no file"]


def test_the_lost_process_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "GRACE", 0.1)
    monkeypatch.setattr(failures, "_lost", False)
    for name, value in {"is_initialized": True, "get_world_size": 4, "get_rank": 1}.items():
        monkeypatch.setattr(failures.dist, name, lambda value=value: value)
    store |= {"saelab/waiting/0": b"", "saelab/waiting/3": b""}
    told = r"^process 2 of 4 has ended or does not answer \(gloo: Timed out"
    with pytest.raises(LostProcess, match=told) as error, naming_lost():
        raise RuntimeError("gloo: Timed out waiting 5000ms\nmore")
    assert "\n" not in str(error.value) and failures.is_lost()
    with pytest.raises(RuntimeError, match="shapes"), naming_lost():  # an error of this process
        raise RuntimeError("shapes do not match")


def test_wrong_arguments_are_explained_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    slept: list[float] = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr("saelab.cli.console.time.sleep", slept.append)

    def command(width: int = 3) -> int:
        return width

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            parse(command, "train", ["--width", "wide"])
        assert bool(capsys.readouterr().err) == (rank == "0") and len(slept) == int(rank)
        assert parse(command, "train", ["--width", "4"]) == 4


class Pair(Parallel):
    """Two processes, of which the other one does as this one."""

    def sum_all(self, tensor: torch.Tensor, purpose: str) -> torch.Tensor:
        self.traffic["exchanges"] += 1
        return 2 * tensor


def test_flags_are_exchanged_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, steps, most in ((0.01, 2000, 40), (5.0, 20, 20)):
        now = [0.0]
        monkeypatch.setattr(world.time, "monotonic", lambda now=now: now[0])
        pair = Pair(data_size=2)
        poll, told = Poll(pair), []
        for step in range(steps):
            now[0] += seconds
            told.append(poll(step >= steps // 2))
        assert pair.traffic["exchanges"] <= most
        assert not any(told[: steps // 2]) and any(told[steps // 2 : steps // 2 + max(1, round(2 / seconds))])
    assert Poll(SINGLE)(True) and not Poll(SINGLE)(False)


@pytest.mark.parametrize(
    ("device", "cards", "message"),
    [
        ("cuda:0", 2, "device=cuda:0 is one GPU for 2 processes; use cuda"),
        ("cuda", 1, "2 processes here, and GPUs for 1"),
    ],
)
def test_processes_do_not_share_a_gpu(device: str, cards: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        start_world(device=device)


def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []

    class Stop(Exception):
        pass

    def join(backend: str, **options: Any) -> None:
        chosen.append(backend)
        raise Stop

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(world.dist, "init_process_group", join)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Stop):
        start_world(device="cuda")
    assert chosen == [torch.device("cuda", 3), "cpu:gloo,cuda:nccl"]


def test_processes_that_are_started_again_do_not_meet_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store still holds what those of the first start have asked, answered and written."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = failures.dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(failures, "_token", None)
    rank = threading.local()

    def client(url: str, timeout: timedelta) -> Iterator[Any]:
        yield failures.dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout), rank.number, 3

    monkeypatch.setattr(failures.dist, "rendezvous", client)

    def start(number: int) -> bytes:
        rank.number = number
        store = failures.meet(20.0)["store"]
        assert not store.check([f"address/{number}"]), "left by the first start"
        store.set(f"address/{number}", str(number))
        return store.get("address/1")

    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(start, range(3))) == [b"1"] * 3
    del server
