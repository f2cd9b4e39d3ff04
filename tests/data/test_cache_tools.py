"""Looking after caches: merging, describing, checking, and what a store refuses."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.data.cache.merge import cache_summary, caches_in, merge
from saelab.errors import UserError


def make(path: str | Path, n: int, seed: int = 0, **options: object) -> ActivationCache:
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(n, 5, generator=generator)
    settings = {"context_length": 10, "shard_rows": 60, "vocabulary": [f"w{i}" for i in range(100)]}
    tokens = torch.randint(100, (n,), generator=generator)
    return ActivationCache.from_tensors(path, acts, tokens, **settings | options)


def test_merging_equals_writing_at_once(tmp_path: Path) -> None:
    parts = [make(tmp_path / "a", 130, 1), make(tmp_path / "b", 40, 2), make(tmp_path / "c", 95, 3)]
    merged = merge(parts, tmp_path / "all")
    merged.verify()
    acts = torch.cat([part.read(range(part.n_rows)).acts for part in parts])
    assert torch.equal(merged.read(range(merged.n_rows)).acts, acts)
    assert merged.manifest.n_contexts == 13 + 4 + 10
    assert merged.manifest.held_out_from == 130 + 40 + 90  # the short last context of c
    training = acts[: merged.manifest.held_out_from].double()
    assert merged.manifest.mean == pytest.approx(training.mean(0).tolist(), abs=1e-12)
    assert merged.manifest.rms_norm == pytest.approx(float(training.square().sum(1).mean().sqrt()), rel=1e-12)
    assert [merged.document(row) for row in (0, 129, 130, 170)] == [0, 12, 13, 17]
    tokens, _ = merged.tokens_window(131, 5, 3)
    assert tokens.tolist() == parts[1].read(range(5)).tokens.tolist()
    assert merged.token_strings(tokens) == [f"w{i}" for i in tokens.tolist()]


def test_merged_gradients_share_a_scale(tmp_path: Path) -> None:
    parts = []
    for name, scale in (("a", 2.0**10), ("b", 2.0**4)):
        grads = torch.randn(30, 3)
        cache = ActivationCache.from_tensors(
            tmp_path / name, torch.randn(30, 3), grads=grads, grad_scale=scale, dtype="float16"
        )
        parts.append((cache, grads))
    merged = merge([cache for cache, _ in parts], tmp_path / "all")
    assert merged.manifest.grad_scale == 2.0**4
    got = merged.read(range(60), grads=True).grads
    assert got is not None
    torch.testing.assert_close(got, torch.cat([g for _, g in parts]), rtol=2**-11, atol=2**-28)


def test_unlike_caches_are_not_merged(tmp_path: Path) -> None:
    a = make(tmp_path / "a", 50, hook_name="blocks.1.hook_resid_post")
    b = make(tmp_path / "b", 50, hook_name="blocks.2.hook_resid_post")
    with pytest.raises(UserError, match=r"cannot merge .*b: its hook_name is 'blocks\.2"):
        merge([a, b], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    imported = [make(tmp_path / name, 50, model=name) for name in ("c", "d")]  # without a fingerprint of the weights
    with pytest.raises(UserError, match=r"cannot merge .*d: its model is 'd'"):
        merge(imported, tmp_path / "all")
    other = make(tmp_path / "e", 50, model="c", vocabulary=[f"v{i}" for i in range(100)])  # of the same size
    none = make(tmp_path / "f", 50, model="c", vocabulary=None)
    for cache in (other, none):
        with pytest.raises(
            UserError, match=r"cannot merge .*: its vocabulary is not that of .*c, so that its token ids"
        ):
            merge([imported[0], cache], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_caches_of_nobody_knows_which_model_are_merged_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, model in enumerate(("", "named")):
        caplog.clear()
        parts = [make(tmp_path / f"{number}-{name}", 50, model=model) for name in "ab"]
        merge(parts, tmp_path / f"{number}-all")
        assert ("do not say of which model they are" in caplog.text) == (not model)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", 130)
    make(tmp_path / "b", 70)
    main(["cache", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "all"), "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == 200
    main(["cache", "info", str(tmp_path / "all"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(cache_summary(ActivationCache(tmp_path / "all"))))
    main(["cache", "verify", str(tmp_path / "all"), "--json"])
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "all"), "shards": 5, "intact": True}
    victim = tmp_path / "all" / "shard_00003.safetensors"
    data = bytearray(victim.read_bytes())
    data[-9] ^= 4
    victim.write_bytes(data)
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "verify", str(tmp_path / "all")])
    assert stopped.value.code == 2
    assert "shard_00003.safetensors is corrupted" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "verfy", str(tmp_path / "all")])
    assert stopped.value.code == 2
    assert "did you mean verify" in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_hooks_is_found(tmp_path: Path) -> None:
    make(tmp_path / "many" / "blocks.1.hook_resid_post", 20)
    make(tmp_path / "many" / "blocks.2.hook_resid_post", 20)
    assert [Path(cache.path).name[:8] for cache in caches_in(tmp_path / "many")] == ["blocks.1", "blocks.2"]
    with pytest.raises(UserError, match="not an activation cache"):
        caches_in(tmp_path)


def test_what_a_store_refuses_in_words_of_its_own_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentials(Exception):
        """As boto's: no error of the system."""

    def refuse(*args: object, **options: object) -> None:
        raise NoCredentials("Unable to locate credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.size", refuse)
    with pytest.raises(UserError, match=r"memory://c: Unable to locate credentials; check the credentials"):
        ActivationCache("memory://c")


def test_head_is_the_beginning_of_a_pass(tmp_path: Path) -> None:
    cache = make(tmp_path / "c", 130)
    for split, seed, n in (("all", None, 70), ("train", 0, 33), ("held_out", None, None), ("all", None, 10**6)):
        rows = torch.cat([b.rows for b in cache.batches(cache.n_split(split), split=split, seed=seed)])
        parts = list(cache.head(n, 32, split=split, seed=seed))
        assert torch.equal(torch.cat([p.rows for p in parts]), rows[:n])
        assert all(len(p.acts) == len(p.tokens) == len(p.rows) <= 32 for p in parts)
        assert torch.equal(torch.cat([p.acts for p in parts]), cache.read(rows[:n]).acts)
    with pytest.raises(UserError, match="n=0 are wanted"):
        next(cache.head(0))
    assert not [t for t in threading.enumerate() if t.name == "saelab-read-ahead"]


def test_merging_into_one_of_the_caches_keeps_it(tmp_path: Path) -> None:
    parts = [make(tmp_path / "a", 130, 1), make(tmp_path / "b", 40, 2)]
    with pytest.raises(UserError, match="write to another folder"):
        merge(parts, f"{tmp_path}/b/../a", overwrite=True)
    parts[0].verify()
