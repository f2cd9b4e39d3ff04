"""The activation cache: what is written is what is read, in every order, and damage is named."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError


def make(path: Path, n: int = 1000, d_in: int = 7, **options: object) -> tuple[ActivationCache, torch.Tensor]:
    acts = torch.randn(n, d_in)
    cache = ActivationCache.from_tensors(
        path, acts, torch.arange(n), **{"shard_rows": 300, "context_length": 10} | options
    )
    return cache, acts


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_back_what_was_written(tmp_path: Path, dtype: str) -> None:
    cache, acts = make(tmp_path / "c", dtype=dtype)
    expected = acts.to(getattr(torch, dtype)).float()
    got = list(ActivationCache(tmp_path / "c").batches(128, split="all", seed=None))
    assert torch.equal(torch.cat([b.acts for b in got]), expected)
    assert torch.equal(torch.cat([b.tokens for b in got]), torch.arange(1000))
    rows = torch.tensor([999, 0, 300, 299, 300])
    assert torch.equal(cache.read(rows).acts, expected[rows])
    assert torch.equal(cache.read(rows).rows, rows)


def test_statistics_are_those_of_the_training_rows(tmp_path: Path) -> None:
    cache, acts = make(tmp_path / "c")
    m, x = cache.manifest, acts[:950].double().numpy()
    assert m.held_out_from == 950  # the last 5 of 100 contexts of 10
    # Float64 sums in another order: 1e-12 leaves room for 1000 additions at 2e-16 each.
    np.testing.assert_allclose(m.mean, x.mean(0), rtol=0, atol=1e-12)
    norms = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose([m.rms_norm, m.mean_norm], [np.sqrt((norms**2).mean()), norms.mean()], rtol=1e-12)
    np.testing.assert_allclose(m.variance, ((x - x.mean(0)) ** 2).sum(1).mean(), rtol=1e-12)
    assert m.scale == 2.0 ** round(-np.log2(m.rms_norm))


@pytest.mark.parametrize("window_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("batch_size", [1, 64, 950])
def test_a_shuffled_pass_visits_each_row_once(tmp_path: Path, window_bytes: int, batch_size: int) -> None:
    _, acts = make(tmp_path / "c")
    cache = ActivationCache(tmp_path / "c", window_bytes=window_bytes)
    batches = list(cache.batches(batch_size))
    assert len(batches) == cache.n_batches(batch_size)
    rows = torch.cat([b.rows for b in batches])
    assert torch.equal(rows.sort().values, torch.arange(950))
    assert not torch.equal(rows, torch.arange(950))
    assert torch.equal(torch.cat([b.acts for b in batches]), acts[rows])
    assert torch.equal(torch.cat([b.tokens for b in batches]), rows)


def test_order_depends_on_seed_and_epoch_only(tmp_path: Path) -> None:
    make(tmp_path / "c")
    cache = ActivationCache(tmp_path / "c", window_bytes=20_000)

    def order(size: int, **options: int) -> torch.Tensor:
        return torch.cat([b.rows for b in cache.batches(size, **options)])

    assert torch.equal(order(64), order(100))
    assert not torch.equal(order(64), order(64, epoch=1))
    assert not torch.equal(order(64), order(64, seed=1))


@pytest.mark.parametrize("start", [0, 1, 7, 14])
def test_a_pass_can_start_anywhere(tmp_path: Path, start: int) -> None:
    make(tmp_path / "c")
    cache = ActivationCache(tmp_path / "c", window_bytes=20_000)
    whole = [b.rows for b in cache.batches(64)]
    late = [b.rows for b in cache.batches(64, start=start)]
    assert len(late) == len(whole) - start
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], late))


def test_drop_last_and_splits(tmp_path: Path) -> None:
    cache, _ = make(tmp_path / "c")
    assert [len(b.rows) for b in cache.batches(400, drop_last=True)] == [400, 400]
    assert [len(b.rows) for b in cache.batches(400)] == [400, 400, 150]
    held = torch.cat([b.rows for b in cache.batches(50, split="held_out", seed=None)])
    assert torch.equal(held, torch.arange(950, 1000))
    with pytest.raises(UserError, match="batch size 51 exceeds the 50 rows of the held_out split"):
        cache.batches(51, split="held_out")


def test_rows_spread_over_a_split_end_with_its_last_one_however_many_there_are() -> None:
    many: Any = SimpleNamespace(split_rows=lambda split: (10, 2**24 + 4))  # float32 has no odd numbers there
    rows = ActivationCache.spread_rows(many, 5, "train").tolist()
    assert rows[0] == 10 and rows[-1] == 2**24 + 3 and len(set(rows)) == 5 and rows == sorted(rows)
    few: Any = SimpleNamespace(split_rows=lambda split: (3, 6))
    assert ActivationCache.spread_rows(few, 100).tolist() == [3, 4, 5]


def test_gradients_come_back_unscaled(tmp_path: Path) -> None:
    grads = torch.randn(40, 3) * 1e-6
    cache = ActivationCache.from_tensors(
        tmp_path / "c", torch.randn(40, 3), grads=grads, grad_scale=2.0**20, dtype="float16", held_out=0
    )
    got = next(cache.batches(40, seed=None, grads=True)).grads
    assert got is not None
    torch.testing.assert_close(got, grads, rtol=2**-11, atol=2**-45)  # half an ulp of fp16; subnormals / scale
    assert next(cache.batches(40)).grads is None
    plain, _ = make(tmp_path / "p")
    with pytest.raises(UserError, match="--gradients"):
        plain.batches(10, grads=True)


def test_windows_stay_in_their_context(tmp_path: Path) -> None:
    cache, _ = make(tmp_path / "c")
    tokens, offset = cache.tokens_window(305, before=3, after=2)
    assert tokens.tolist() == [302, 303, 304, 305, 306, 307]
    assert offset == 3
    tokens, offset = cache.tokens_window(300, before=3, after=100)
    assert tokens.tolist() == list(range(300, 310))
    assert offset == 0
    assert cache.document(305) == 30


def test_leaving_a_pass_early_ends_its_threads(tmp_path: Path) -> None:
    cache, _ = make(tmp_path / "c")
    before = threading.active_count()
    stream = cache.batches(10)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_damage_is_named(tmp_path: Path) -> None:
    make(tmp_path / "c")
    victim = tmp_path / "c" / "shard_00001.safetensors"
    good = victim.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    victim.write_bytes(flipped)
    with pytest.raises(UserError, match=r"shard_00001\.safetensors is corrupted"):
        ActivationCache(tmp_path / "c", verify=True)
    victim.write_bytes(good[:-1])
    with pytest.raises(UserError, match=r"shard_00001\.safetensors has"):
        ActivationCache(tmp_path / "c")
    victim.unlink()
    with pytest.raises(UserError, match=r"shard_00001\.safetensors is missing"):
        ActivationCache(tmp_path / "c")
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(UserError, match="not an activation cache"):
        ActivationCache(tmp_path / "c")


def test_existing_folders_are_respected(tmp_path: Path) -> None:
    make(tmp_path / "c")
    with pytest.raises(UserError, match="already exists"):
        make(tmp_path / "c")
    cache, _ = make(tmp_path / "c", overwrite=True, n=50)
    assert cache.n_rows == 50
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an activation cache and is not overwritten"):
        make(tmp_path / "notes", overwrite=True)


@pytest.mark.parametrize("number", [-1, 1 << 31])
def test_document_numbers_that_a_shard_cannot_hold_are_refused(number: int, tmp_path: Path) -> None:
    documents = torch.tensor([0, 0, number])
    with pytest.raises(UserError, match=rf"shard_00000\.safetensors has a document number {number}; number the"):
        ActivationCache.from_tensors(tmp_path / "cache", torch.randn(3, 4), documents=documents)


def test_non_finite_values_are_refused_with_their_place(tmp_path: Path) -> None:
    acts = torch.randn(1000, 4)
    acts[613, 2] = float("nan")
    with pytest.raises(UserError, match=r"not finite in shard_00002.safetensors, row 13"):
        ActivationCache.from_tensors(tmp_path / "c", acts, shard_rows=300)
    acts[613, 2] = 1e6
    with pytest.raises(UserError, match="too large for float16"):
        ActivationCache.from_tensors(tmp_path / "d", acts, shard_rows=300, dtype="float16")


def test_a_remote_cache_reads_the_same(tmp_path: Path) -> None:
    local, acts = make(tmp_path / "c")
    ActivationCache.from_tensors("memory://cache", acts, torch.arange(1000), shard_rows=300, context_length=10)
    remote = ActivationCache("memory://cache", window_bytes=20_000, verify=True)
    small = ActivationCache(tmp_path / "c", window_bytes=20_000)
    for a, b in zip(remote.batches(64), small.batches(64), strict=True):
        assert torch.equal(a.acts, b.acts) and torch.equal(a.rows, b.rows)
    rows = torch.tensor([5, 900, 6, 5, 301])
    assert torch.equal(remote.read(rows).acts, acts[rows])
    assert remote.tokens_window(305, 3, 2)[0].tolist() == local.tokens_window(305, 3, 2)[0].tolist()
    assert remote.fingerprint == local.fingerprint


def test_passes_side_by_side_do_not_disturb_each_other(tmp_path: Path) -> None:
    _, acts = make(tmp_path / "c")
    cache = ActivationCache(tmp_path / "c", window_bytes=20_000)
    for _ in range(2):  # the second time round, both use memory that the first has left
        for a, b in zip(cache.batches(64), cache.batches(64, seed=5), strict=True):
            assert torch.equal(a.acts, acts[a.rows])
            assert torch.equal(b.acts, acts[b.rows])


def test_the_fingerprint_covers_the_data_and_where_it_comes_from(tmp_path: Path) -> None:
    acts = torch.randn(40, 4)
    cache = ActivationCache.from_tensors(tmp_path / "a", acts, hook_name="h", model="m")
    before = cache.fingerprint

    def again(name: str, **changed: Any) -> str:
        about = {"hook_name": "h", "model": "m"} | changed
        return ActivationCache.from_tensors(tmp_path / name, acts, **about).fingerprint

    assert again("b") == before
    assert before not in (again("c", hook_name="g"), again("d", model="n"), again("e", held_out=0.5))
    acts[7, 2] += 1
    assert again("f") != before
    # What the manifest says beside that may grow or be worded anew: runs trained on the cache stay its runs.
    path = tmp_path / "a" / "manifest.json"
    content = json.loads(path.read_text()) | {"note": "new", "text": "renamed", "settings": {"more": 1}}
    path.write_text(json.dumps(content))
    assert ActivationCache(tmp_path / "a").fingerprint == before


def test_batches_come_on_the_device_that_is_asked_for(tmp_path: Path) -> None:
    cache, _ = make(tmp_path / "c")
    stream = cache.batches(100, device="meta")
    batch = next(stream)
    assert (batch.acts.device.type, batch.tokens.device.type) == ("meta", "cpu")
    stream.close()
