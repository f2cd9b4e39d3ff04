"""The window on the device: the rows of the reader on the CPU, in its order, whenever the device does its work."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.data.cache import ActivationCache, Batch, feed
from saelab.data.cache.order import BLOCK, Order
from saelab.errors import UserError
from saelab.sae import build
from saelab.training import TrainConfig, batches, fit_steps

D_IN = 12


class Mark:
    def __init__(self, device: LateDevice, end: int) -> None:
        self.device, self.end, self.waited_for = device, end, False

    def synchronize(self) -> None:
        self.device.work_up_to(self.end)


class LateDevice:
    """A device in the memory of the CPU that does nothing before somebody waits for it.

    What is copied too late, from a buffer that was filled again or to a window that is being read, is then wrong.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.buffers = [torch.empty(feed.STAGING, dtype=torch.uint8) for _ in range(2)]
        self.queued: list[Callable[[], object]] = []
        self.done = 0
        self.lock = threading.RLock()
        self.caller_marks: list[Mark] = []

    def staging(self) -> list[torch.Tensor]:
        return self.buffers

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.empty(shape, dtype=dtype)
        return memory.fill_(float("nan")) if dtype.is_floating_point else memory.zero_()

    def queue(self, work: Callable[[], object]) -> Mark:
        with self.lock:
            self.queued.append(work)
            return Mark(self, len(self.queued))

    def fetch(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.work_up_to(len(self.queued))
        return make().clone()

    def caller_waits(self, mark: Mark) -> None:
        mark.synchronize()

    def caller_mark(self) -> Mark:
        self.caller_marks.append(Mark(self, 0))
        return self.caller_marks[-1]

    def wait(self, mark: Mark) -> None:
        mark.waited_for = True

    def finish(self) -> None:
        self.work_up_to(len(self.queued))

    def work_up_to(self, end: int) -> None:
        with self.lock:
            while self.done < end:
                self.queued[self.done]()
                self.done += 1


def cache_of(folder: Path, n: int = 5000, dtype: str = "float16", **options: Any) -> ActivationCache:
    acts, grads = torch.randn(n, D_IN), torch.randn(n, D_IN)
    ActivationCache.from_tensors(
        folder, acts, torch.arange(n) % 997, grads=grads, grad_scale=4.0, dtype=dtype, shard_rows=1300, **options
    )
    return ActivationCache(folder, window_bytes=5 * BLOCK * D_IN * 4)  # several windows, of blocks from all over


def on(transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "transport_for", lambda device, size: None if device is None else transport)


def assert_same(found: Iterator[Batch], expected: Iterator[Batch]) -> int:
    count = 0
    for a, b in zip(found, expected, strict=True):
        for name, x, y in zip(Batch._fields, a, b):
            assert (x is None) == (y is None), name
            if x is not None and y is not None:
                assert x.dtype == y.dtype and torch.equal(x, y), name
        count += 1
    return count


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("grads", [False, True], ids=["acts", "with-grads"])
def test_the_batches_are_those_of_the_cpu(
    dtype: str, grads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "STAGING", 3000)  # many copies, and windows that are no multiple of a buffer
    cache = cache_of(tmp_path / "cache", dtype=dtype)
    device = LateDevice()
    on(device, monkeypatch)
    for options in ({"seed": 3}, {"seed": None}, {"seed": 3, "epoch": 2, "start": 7}, {"seed": 1, "split": "held_out"}):
        shape = {"grads": grads, "drop_last": "start" in options, **options}
        assert assert_same(cache.batches(111, device="late", **shape), cache.batches(111, **shape)) >= 2
    assert device.done == len(device.queued)
    # A window is overwritten only after the caller's work on it: all but the last two of each pass are waited for.
    assert sum(mark.waited_for for mark in device.caller_marks) >= 3


@pytest.mark.parametrize("device", [None, "late"])
def test_processes_read_equal_parts_of_each_batch(
    device: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path / "cache", dtype="float32")
    on(LateDevice(), monkeypatch)
    for options in ({"seed": 3, "epoch": 2, "start": 7}, {"seed": None, "start": 0}):
        shape = {"grads": True, "drop_last": True, **options}
        whole, asked = list(cache.batches(96, **shape)), {"device": device, **shape}
        parts = [list(cache.batches(96, part=(number, 3), **asked)) for number in range(3)]
        joined = (Batch(*(torch.cat(c) if torch.is_tensor(c[0]) else None for c in zip(*b))) for b in zip(*parts))
        assert assert_same(joined, iter(whole)) == len(whole) > 20
    with pytest.raises(UserError, match="batches of 100 rows, the last one too, must divide over 3 processes"):
        next(cache.batches(100, part=(0, 3), drop_last=True, device=device))


@pytest.mark.parametrize("device", [None, "late"])
def test_a_window_may_hold_no_row_of_a_process(
    device: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path / "cache", dtype="float32")  # 512 rows to a window, 500 of each process to a batch
    on(LateDevice(), monkeypatch)
    whole = cache.batches(1500, grads=True, drop_last=True)
    parts = [cache.batches(1500, grads=True, drop_last=True, part=(number, 3), device=device) for number in range(3)]
    joined = (Batch(*(torch.cat(c) if torch.is_tensor(c[0]) else None for c in zip(*b))) for b in zip(*parts))
    assert assert_same(joined, whole) == 3


@pytest.mark.parametrize("device", [None, "late"])
def test_a_pass_may_begin_with_the_rest_of_a_batch(
    device: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path / "cache", dtype="float32")
    on(LateDevice(), monkeypatch)
    whole = torch.cat([batch.acts for batch in cache.batches(100)])
    found = list(cache.rows_of_pass(30, 2000, 100, head=70, device=device))
    assert [len(batch.rows) for batch in found] == [70, *[100] * 19]
    assert torch.equal(torch.cat([batch.acts for batch in found]), whole[30:2000])


def test_a_process_looks_at_no_row_of_another(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache", dtype="float32")
    row = int(next(cache.batches(90, drop_last=True)).rows[40])
    shard, local = cache.shards.locate(row)
    cache.shards.columns(shard)["acts"].tensor[local, 5] = float("inf")  # pyright: ignore[reportAttributeAccessIssue]
    for number in (0, 2):
        assert len(list(cache.batches(90, drop_last=True, part=(number, 3)))) > 20
    with pytest.raises(UserError, match="non-finite activation"):
        next(cache.batches(90, drop_last=True, part=(1, 3)))


def test_a_buffer_that_is_filled_before_it_was_copied_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in is of use: without waiting for the copies it gives other rows."""
    monkeypatch.setattr(feed, "STAGING", 3000)
    cache, device = cache_of(tmp_path / "cache"), LateDevice()
    on(device, monkeypatch)
    monkeypatch.setattr(Mark, "synchronize", lambda self: None)
    monkeypatch.setattr(device, "caller_waits", lambda mark: device.work_up_to(mark.end))
    found = next(cache.batches(111, device="late"))
    assert not torch.equal(found.acts, next(cache.batches(111)).acts)


def test_leaving_early_ends_the_thread_and_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, device = cache_of(tmp_path / "cache"), LateDevice()
    on(device, monkeypatch)
    before = threading.active_count()
    stream = cache.batches(100, device="late")
    next(stream)
    stream.close()
    assert threading.active_count() == before and device.done == len(device.queued)


def test_a_non_finite_row_is_named_at_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(tmp_path / "cache", dtype="float32")
    row = 3210
    shard, local = cache.shards.locate(row)
    cache.shards.columns(shard)["acts"].tensor[local, 5] = float("inf")  # pyright: ignore[reportAttributeAccessIssue]

    def all_of(device: str | None) -> tuple[int, str]:
        count, stream = 0, cache.batches(100, device=device)
        with pytest.raises(UserError) as error:
            for _ in stream:
                count += 1
        return count, str(error.value)

    expected = all_of(None)
    on(LateDevice(), monkeypatch)
    assert all_of("late") == expected
    assert "has a non-finite activation in row" in expected[1] and 0 < expected[0] < 47


@pytest.mark.parametrize("variant", ["topk", "gradient_topk"])
def test_a_run_fed_from_the_device_and_resumed_is_that_of_the_cpu(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path / "cache")
    config = TrainConfig(epochs=2, batch_size=256, lr=1e-3)

    def run(name: str, steps: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        sae = build(variant, d_in=D_IN, d_sae=48, k=4)
        run = fit_steps(sae, cache, config, tmp_path / name, resume=resume)
        for _ in itertools.islice(run, steps):
            pass
        run.close()
        return sae.state_dict()

    expected = run("cpu")
    on(LateDevice(), monkeypatch)
    run("late", steps=23)
    for name, weight in run("late", resume=True).items():
        assert torch.equal(weight, expected[name]), name
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("cpu", "late")]
    assert lines[0] == lines[1]


def test_a_sweeps_members_get_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of a sweep are made once, on its device."""
    cache, asked = cache_of(tmp_path / "cache"), []
    monkeypatch.setattr(feed, "transport_for", lambda device, size: asked.append(device))
    stream = batches(cache, TrainConfig(epochs=1, batch_size=64), 0, False, "cpu")
    next(stream)
    assert asked == ["cpu"]


def test_windows_that_do_not_fit_the_device_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(feed, "Cuda", lambda device: made.append(device) or "transport")
    assert feed.transport_for("cuda:0", 250) == "transport" and made == [torch.device("cuda", 0)]
    assert feed.transport_for("cuda:0", 251) is None
    assert [feed.transport_for(name, 1) for name in (None, "cpu", "mps")] == [None] * 3


def test_the_bytes_of_a_window_are_those_of_what_is_copied(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache")
    order = Order(0, 5000, 0, 0, 4)
    assert feed.window_bytes(cache.shards, order, ("acts", "tokens", "grads")) == 4 * BLOCK * D_IN * 2 * 2
    assert feed.window_bytes(cache.shards, Order(0, 300, 0, 0, 4), ("acts", "tokens")) == 300 * D_IN * 2


class Stream:
    """The calls of a CUDA stream; work on it is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waited = device, 0

    def record_event(self) -> Mark:
        return Mark(LateDevice(), 0)

    def wait_event(self, event: Mark) -> None:
        assert isinstance(event, Mark)
        self.waited += 1


def test_the_calls_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of the transport, with memory of the CPU under the names of CUDA's."""
    cache, gpu = cache_of(tmp_path / "cache"), torch.device("cuda", 1)
    mine, real, current = Stream(gpu), torch.empty, []

    def empty(*shape: Any, pin_memory: bool = False, device: Any = "cpu", **options: Any) -> torch.Tensor:
        assert pin_memory or torch.device(device).type == "cpu" or current == [gpu, "stream"]
        return real(*shape, **options)

    @contextmanager
    def on_it(what: Any) -> Iterator[None]:
        current.append("stream" if isinstance(what, Stream) else what)
        yield
        current.pop()

    finished = []
    for name, value in {
        "Stream": Stream,
        "current_stream": lambda device: mine,
        "device": on_it,
        "stream": on_it,
        "synchronize": finished.append,
        "mem_get_info": lambda device: (1 << 30, 1 << 31),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", empty)
    assert assert_same(cache.batches(111, device=gpu), cache.batches(111)) > 40
    assert finished == [gpu] and mine.waited >= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("grads", [False, True])
def test_the_batches_on_a_gpu_are_those_of_the_cpu(
    grads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "STAGING", 3000)
    cache = cache_of(tmp_path / "cache", n=40_000)
    for epoch in range(3):
        options = {"epoch": epoch, "grads": grads}
        found = (
            batch._replace(acts=batch.acts.cpu(), grads=None if batch.grads is None else batch.grads.cpu())
            for batch in cache.batches(111, device="cuda", **options)
        )
        assert assert_same(found, cache.batches(111, **options)) > 100
