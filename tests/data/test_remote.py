"""Caches in an object store: a real S3 server, and lost connections, refusals and other processes on the way to it."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab import stores
from saelab.cli import main
from saelab.data.cache import ActivationCache, CacheWriter, Manifest
from saelab.data.cache.order import read_ahead
from saelab.data.cache.storage import Folder
from saelab.errors import UserError
from saelab.files import LOCK, url_of
from saelab.layout import MANIFEST
from saelab.stores import Store, lease
from tests.data.test_cache_tools import make

D_IN = 5


class Hasty:
    """asyncio, of which nobody sleeps."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, ours and those of s3fs."""
    monkeypatch.setattr("s3fs.core.asyncio", Hasty())
    monkeypatch.setattr(stores, "SHORTEST", 0.01)
    monkeypatch.setattr(stores, "LONGEST", 0.01)
    monkeypatch.setattr(stores, "FIRST", 0.6)


def test_a_cache_in_an_object_store(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/demo"
    remote, local = make(url, 2000, shard_rows=600), make(tmp_path / "c", 2000, shard_rows=600)
    remote = ActivationCache(url, verify=True, window_bytes=20_000)
    assert remote.fingerprint == local.fingerprint
    small = ActivationCache(tmp_path / "c", window_bytes=20_000)
    for a, b in zip(remote.batches(64), small.batches(64), strict=True):
        assert torch.equal(a.acts, b.acts) and torch.equal(a.tokens, b.tokens)
    rows = [5, 1999, 6, 5, 301]
    assert torch.equal(remote.read(rows).acts, local.read(rows).acts)
    assert remote.token_strings([3, 7]) == ["w3", "w7"]
    with pytest.raises(UserError, match="already exists"):
        make(url, 10)
    remote.folder.remove("shard_00002.safetensors")
    with pytest.raises(UserError, match=r"shard_00002\.safetensors is missing"):
        ActivationCache(url)


def test_what_fits_the_buffer_is_fetched_once(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.data.cache.storage.WHOLE", 0)
    monkeypatch.setattr("saelab.data.cache.buffer.RESERVE", 0)
    wanted = make(f"{bucket}/demo", 2000, shard_rows=1000).read(range(1900)).acts
    whole = 1900 * (D_IN * 4 + 4)  # bytes of the training rows
    for limit in (1 << 30, whole // 3, 0):
        cache = ActivationCache(f"{bucket}/demo", window_bytes=20_000, buffer_bytes=limit)
        buffer = cache.folder._buffer
        list(cache.batches(64))
        first = buffer.fetched
        for epoch in (1, 2):
            rows, acts = zip(*((b.rows, b.acts) for b in cache.batches(64, epoch=epoch)))
            assert torch.equal(torch.cat(acts)[torch.cat(rows).argsort()], wanted)
        assert buffer.used <= limit
        assert buffer.fetched - first == 2 * (whole - min(buffer.used, whole))
        assert buffer.used >= 0.7 * min(limit, whole)
    # Its file has no name: nothing is left behind by a process that is killed.
    assert not list((tmp_path / "home" / "buffers").iterdir())


def test_a_buffer_on_a_full_disk_stays_as_it_is(bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    wanted = make(f"{bucket}/demo", 2000, shard_rows=1000).read(range(1900)).acts

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    for place, reason in (("tempfile.TemporaryFile", "No space left on device"), ("RESERVE", "the disk has less")):
        with monkeypatch.context() as patched:
            patched.setattr(f"saelab.data.cache.buffer.{place}", full if place != "RESERVE" else 1 << 60)
            cache = ActivationCache(f"{bucket}/demo", window_bytes=20_000)
            batches = list(cache.batches(64))
        order = torch.cat([b.rows for b in batches]).argsort()
        assert torch.equal(torch.cat([b.acts for b in batches])[order], wanted)
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith(f"the local buffer stays at 0.0 GB: {reason}")
        caplog.clear()


def test_a_lost_connection_is_tried_again(
    bucket: str, s3_server: Any, tmp_path: Path, fast: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Every third request fails, in one of four ways; what is written and read is what it is without faults."""
    local = make(tmp_path / "c", 1000, shard_rows=600)
    faults = ["cut", "half", 500, (503, "SlowDown")]
    with s3_server.faulty(lambda method, path, number: faults[number // 3 % 4] if number % 3 == 0 else None):
        make(f"{bucket}/demo", 1000, shard_rows=600)
        cache = ActivationCache(f"{bucket}/demo", window_bytes=20_000, verify=True)
        assert cache.fingerprint == local.fingerprint
        for a, b in zip(cache.batches(64, seed=None), local.batches(64, seed=None), strict=True):
            assert torch.equal(a.acts, b.acts)
    assert not Folder(f"{bucket}/demo").exists(LOCK)


def test_a_request_that_hangs_is_repeated(
    bucket: str, s3_server: Any, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "SILENT", 0.7)
    type(Store(bucket).fs).clear_instance_cache()
    wanted = make(f"{bucket}/demo", 300).read(range(300)).acts
    hung: list[str] = []

    def hang(method: str, path: str, number: int) -> str | None:
        if method != "GET" or "shard" not in path or len(hung) == 2:
            return None
        hung.append(path)
        return "hang"

    with s3_server.faulty(hang):
        started = time.monotonic()
        assert torch.equal(ActivationCache(f"{bucket}/demo").read(range(300)).acts, wanted)
        assert len(hung) == 2 and time.monotonic() - started < 9


def test_a_store_that_never_answers_is_one_line(
    bucket: str, s3_server: Any, fast: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(f"{bucket}/demo", 100)
    stores._answered.clear()
    for endpoint in (s3_server.url, "http://127.0.0.1:9"):  # at the second nothing listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        type(Store(bucket).fs).clear_instance_cache()
        with s3_server.faulty(lambda *_: "cut"), pytest.raises(SystemExit) as stopped:
            main(["cache", "info", f"{bucket}/demo"])
        line = " ".join(capsys.readouterr().err.split())
        assert stopped.value.code == 2
        assert line.startswith(f"error: {bucket}/demo: no answer for 1 s (") and "check the connection" in line, line


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((403, "InvalidAccessKeyId"), r"refused by the test; check the credentials"),
        ((403, "RequestTimeTooSkewed"), r"the clock of this machine is wrong; set it"),
        ((301, "PermanentRedirect"), r"set AWS_REGION to the region of the bucket"),
    ],
)
def test_a_refusal_is_one_line_at_once(bucket: str, s3_server: Any, fault: tuple[int, str], said: str) -> None:
    make(f"{bucket}/demo", 100)
    with s3_server.faulty(lambda method, *_: fault if method == "GET" else None):
        with pytest.raises(UserError, match=said):
            ActivationCache(f"{bucket}/demo")
        with pytest.raises(UserError, match=said):
            make(f"{bucket}/new", 100)


def test_addresses(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no bucket no-such-bucket, or these credentials may not see it"):
        ActivationCache("s3://no-such-bucket/demo")
    with pytest.raises(UserError, match="there is no bucket no-such-bucket"):
        make("s3://no-such-bucket/demo", 100)  # which is not made by the way
    assert not Store(bucket).ask("exists", "no-such-bucket")
    with pytest.raises(UserError, match=r"demo is not an activation cache \(no manifest.json\)"):
        ActivationCache(f"{bucket}/demo")
    for url, package in (("gs://b/c", "gcsfs"), ("az://b/c", "adlfs")):
        with pytest.raises(UserError, match=f"cannot open {url}: a package is missing; pip install '{package}'"):
            ActivationCache(url)
    with pytest.raises(UserError, match=r"no kind of storage is called s4://; did you mean s3"):
        ActivationCache("s4://b/c")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    type(Store(bucket).fs).clear_instance_cache()
    with pytest.raises(UserError, match=r"Unable to locate credentials; check the credentials"):
        ActivationCache(f"{bucket}/demo")


def test_urls_survive_pathlib() -> None:
    assert url_of(Path("s3://bucket/a b/")) == url_of("s3:/bucket/a b") == "s3://bucket/a b"
    assert [url_of(text) for text in ("run", "C:/run", "C:\\run", "a:/b", "file:///run", "org/repo")] == [None] * 6
    assert url_of(Path("hf://org/repo")) is None and url_of("memory://x") == "memory://x"


def test_a_cache_that_is_replaced_is_not_mixed(bucket: str) -> None:
    make(f"{bucket}/demo", 2000, shard_rows=1000)
    cache = ActivationCache(f"{bucket}/demo", window_bytes=20_000)
    batches = cache.batches(64)
    next(batches)
    make(f"{bucket}/demo", 2000, seed=9, shard_rows=1000, overwrite=True)
    with pytest.raises(UserError, match=r"demo was replaced while it was read; run the command again"):
        list(batches)


def rows_of(value: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.full((10, 4), value), torch.arange(10), torch.arange(10), torch.arange(10)


def test_two_writers_of_one_prefix(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writes, the other is told; one that is dead is replaced, and if it was not dead, it stops."""
    monkeypatch.setattr(stores, "BEAT", 0.2)
    first = CacheWriter(Folder(f"{bucket}/demo"), Manifest(d_in=4))
    first.write_shard(*rows_of(1.0))
    with pytest.raises(UserError, match=r"another process \(.*\) is writing s3://.*demo; wait for it"):
        CacheWriter(Folder(f"{bucket}/demo"), Manifest(d_in=4), overwrite=True)
    held = first.folder._lease
    assert held is not None
    held._ended.set()  # the process is stopped, or its network is gone
    second = CacheWriter(Folder(f"{bucket}/demo"), Manifest(d_in=4), resume=True)
    assert second.done == {0}
    held._ended.clear()
    held._live()  # and goes on
    with pytest.raises(UserError, match="another process has taken over"):
        first.write_shard(*rows_of(2.0))
    first.close()
    second.write_shard(*rows_of(3.0))
    second.finish()
    cache = ActivationCache(f"{bucket}/demo", verify=True)
    assert cache.read([0, 19]).acts[:, 0].tolist() == [1.0, 3.0]
    assert LOCK not in Folder(f"{bucket}/demo").sizes()


def test_a_writer_killed_on_this_machine_is_not_waited_for(bucket: str) -> None:
    store = Store(f"{bucket}/demo")
    with lease(store) as held:
        content = json.loads(held._content())
    gone = {**content, "pid": 2**22 + 1, "token": "other"}  # above the largest process number
    store.write(LOCK, json.dumps(gone).encode())
    started = time.monotonic()
    with lease(store):
        assert time.monotonic() - started < 2
    assert LOCK not in store.sizes()


def test_a_harvest_that_was_cut_off_is_resumed(bucket: str, s3_server: Any) -> None:
    """The manifest is the last thing written, so that nothing half-written is a cache."""
    writer = CacheWriter(Folder(f"{bucket}/demo"), Manifest(d_in=4))
    writer.write_shard(*rows_of(1.0))

    def refuse(method: str, path: str, number: int) -> tuple[int, str] | None:
        return (403, "ExpiredToken") if method == "PUT" and "shard_00001" in path else None

    with s3_server.faulty(refuse), pytest.raises(UserError, match=r"ExpiredToken: refused by the test; check the cred"):
        writer.write_shard(*rows_of(2.0))
    writer.close()
    with pytest.raises(UserError, match=r"is unfinished; run the same `saelab harvest` with --resume"):
        ActivationCache(f"{bucket}/demo")
    writer = CacheWriter(Folder(f"{bucket}/demo"), Manifest(d_in=4), resume=True)
    assert writer.done == {0}
    writer.write_shard(*rows_of(2.0))
    writer.finish()
    assert ActivationCache(f"{bucket}/demo", verify=True).n_rows == 20
    assert MANIFEST in Folder(f"{bucket}/demo").names()


def test_storage_that_hangs_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("saelab.data.cache.order.SLOW", 0.1)
    answers, used = threading.Event(), []

    def items():
        yield 1
        answers.wait(20)
        yield 2

    with caplog.at_level(logging.WARNING):
        for item in read_ahead(items(), 1):
            used.append(item)
            threading.Timer(0.35, answers.set).start()
    assert used == [1, 2]
    assert [r.message.partition(":")[0] for r in caplog.records] == ["no data for 0 s", "data arrive again"]
    # One who gives up does not wait for it.
    answers.clear()
    hanging = read_ahead(items(), 1)
    next(hanging)
    started = time.monotonic()
    hanging.close()
    assert time.monotonic() - started < 5
    answers.set()
