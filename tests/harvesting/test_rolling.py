"""Rolling caches: the rows of the whole cache, each once, on a bounded part of the disk."""

from __future__ import annotations

import itertools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saelab import files
from saelab.data import tokenized
from saelab.data.cache import ActivationCache
from saelab.data.text import from_documents
from saelab.errors import Stopped, UserError
from saelab.harvesting.rolling import RollingCache, RollingConfig
from saelab.harvesting.rolling.producer import Producer
from saelab.lm import load_model
from tests import tiny_lm
from tests.harvesting.rolling import PASS, TEXT, expected_rows, kill_at, llama, rolling, whole


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def full(model: Any, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return whole(model, tmp_path_factory.mktemp("full") / "cache")


def read(cache: RollingCache, size: int = 48, start: int = 0, **options: Any) -> list[Any]:
    return list(cache.batches(size, drop_last=True, start=start, **options))


def disk(folder: Path) -> int:
    """Bytes of all files below a folder, in the blocks of the file system."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Bytes on disk at the moment of every write, when the new file is whole and the one it replaces is still there."""
    seen: list[int] = []
    sync = files.sync

    def measured(path: Path) -> None:
        seen.append(disk(tmp_path))
        sync(path)

    monkeypatch.setattr(files, "sync", measured)
    return seen


def check_stream(cache: RollingCache, full: ActivationCache, batches: list[Any], size: int, seed: int = 0) -> None:
    """Every row of the stream once, in its order, with the bits of the whole cache."""
    passes = [segment.passes for segment in cache.record.segments]
    order = np.concatenate(expected_rows(full, cache.record.start, passes, seed))
    want = full.read(torch.from_numpy(order[: len(batches) * size]))
    assert [len(batch.rows) for batch in batches] == [size] * len(batches)
    assert torch.equal(torch.cat([batch.acts for batch in batches]), want.acts)
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), want.tokens)
    firsts = np.cumsum([0, *(segment.rows for segment in cache.record.segments)])
    numbers = [np.random.default_rng([seed, i, 0]).permutation(b - a) + a for i, (a, b) in enumerate(pairwise(firsts))]
    assert torch.cat([batch.rows for batch in batches]).tolist() == np.concatenate(numbers)[: len(want.rows)].tolist()


@pytest.mark.parametrize("paced", [True, False])
def test_the_stream_is_the_whole_cache_on_a_bounded_disk(
    model: Any, full: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: list[int], paced: bool
) -> None:
    begin = Producer.__init__
    # As with the model and the training on two devices: the thread runs beside the reader, without turns.
    monkeypatch.setattr(Producer, "__init__", lambda self, h, p, f, _, *rest: begin(self, h, p, f, paced, *rest))
    with rolling(model, tmp_path / "cache") as cache:
        assert read(cache, 48) and cache.record.segments
        check_stream(cache, full, read(cache, 48), 48)  # again from the start: harvested again where it was removed
        assert len(cache.record.segments) >= 3
        limit = cache.config.limit
    assert max(largest) <= limit
    assert (
        sum(segment.rows for segment in cache.record.segments) * 64 * 4 > 1.05 * limit
    )  # it holds no more than a part
    assert not (tmp_path / "cache" / "segments").exists()
    kept = ActivationCache(tmp_path / "cache", verify=True)
    assert torch.equal(kept.read(range(kept.n_rows)).acts, full.read(range(kept.n_rows)).acts)


def test_held_out_documents_never_roll(model: Any, full: ActivationCache, tmp_path: Path) -> None:
    with rolling(model, tmp_path / "cache", tokens=8000) as cache:
        batches = read(cache)
        kept = cache.kept
    assert kept.n_split("held_out") > 100
    held = set(kept.documents("held_out").tolist())
    assert held.isdisjoint(kept.documents("train").tolist())
    first = int(expected_rows(full, cache.record.start, [1], 0)[0].min())
    assert held.isdisjoint(full.documents()[first:].tolist())
    # The text ends before 8000 activations are trained on; its second reading begins after the kept documents, too.
    total = sum(segment.passes for segment in cache.record.segments)
    assert total > -(-full.manifest.n_contexts // 4) - cache.record.start
    check_stream(cache, full, batches, 48)


@pytest.mark.parametrize("write", [0, 20, 41])
def test_a_kill_at_any_write_loses_and_repeats_no_row(
    model: Any, full: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """Killed at the n-th file, then continued from the batch after the last checkpoint, wherever that was."""
    kill_at(monkeypatch, write)
    before: list[Any] = []
    with pytest.raises(KeyboardInterrupt), rolling(model, tmp_path / "cache") as cache:
        for batch in cache.batches(48, drop_last=True):
            before.append(batch)
    monkeypatch.undo()
    start = len(before) // 3 * 2
    with rolling(model, tmp_path / "cache", resume=True) as cache:
        check_stream(cache, full, before[:start] + read(cache, 48, start), 48)


@pytest.mark.parametrize(("tokens", "batches", "old"), [(4000, 60, False), (4000, 60, True), (12000, 220, False)])
def test_a_resume_tokenises_no_document_that_is_done(
    model: Any,
    full: ActivationCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    batches: int,
    old: bool,
) -> None:
    """In the second reading of the text too; but with the record of a version that knew no places."""
    monkeypatch.setattr(tokenized, "GROUP", 500)  # characters: about two documents
    with rolling(model, tmp_path / "cache", tokens=tokens) as cache:
        before = list(itertools.islice(cache.batches(48, drop_last=True), batches))
    done = sum(segment.passes for segment in cache.record.segments)  # what is still to be read of them is on disk
    if old:
        without_places(tmp_path / "cache" / "rolling.json")
    seen, tokenize = [], tokenized._tokenize
    numbers = {text: number for number, text in enumerate(TEXT.documents())}

    def counted(group: Any, tokenizer: Any) -> Any:
        seen.extend(numbers[text] for _, text in group)
        return tokenize(group, tokenizer)

    monkeypatch.setattr(tokenized, "_tokenize", counted)
    with rolling(model, tmp_path / "cache", tokens=tokens, resume=True) as cache:
        seen.clear()  # what was tokenised to check the model on the first pass
        check_stream(cache, full, before + read(cache, 48, batches), 48)
    contexts = [rows[rows >= 0][0] for _, rows in full.contexts("all")][::PASS]
    at = cache.record.start + done % (len(contexts) - cache.record.start)
    first = int(full.documents()[int(contexts[at])])
    if old:
        assert seen[0] == 0
    else:
        assert first - 2 <= seen[0] <= first and first > 30
        assert len(seen) < len(numbers) - first + 3  # once each, and not read again from the start


def without_places(record: Path) -> None:
    """The list of segments as an earlier version wrote it."""
    content = json.loads(record.read_text())
    del content["begin"]
    for segment in content["segments"]:
        del segment["end"]
    record.write_text(json.dumps(content))


def test_a_stop_while_a_segment_is_waited_for(model: Any, tmp_path: Path) -> None:
    asked = False
    with rolling(model, tmp_path / "cache") as cache:

        def report(what: str, done: int, total: int) -> None:
            nonlocal asked
            asked = asked or done > 100

        cache.watch(report, lambda: asked)
        with pytest.raises(Stopped):
            read(cache)
    with rolling(model, tmp_path / "cache", resume=True) as cache:
        assert len(read(cache)) == 4000 // 48


FAMILIES = {
    "gpt2": (tiny_lm.save_gpt2, "blocks.1.hook_mlp_out"),
    "qwen2": (tiny_lm.save_qwen2, "blocks.0.hook_resid_pre"),
    "gemma3": (tiny_lm.save_gemma3, "model.layers.1"),
}
CHATS = from_documents(
    [f"{tiny_lm.sentences(23, seed)}\n\nnumber {seed}: zażółć gęślą jaźń" for seed in range(100, 160)], "second text"
)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_other_models_and_texts(name: str, tmp_path: Path) -> None:
    """Models without BOS, with other points, on another text; rows are dropped by norm, gradients are kept."""
    save, hook = FAMILIES[name]
    model = load_model(save(tmp_path / "model"), device="cpu")
    options: dict[str, Any] = {"gradients": name != "gemma3", "dtype": "float16", "separator": "newline"}
    first = whole(model, tmp_path / "first", CHATS, hook, **options)
    norms = first.read(range(first.n_rows)).acts.norm(dim=1)
    options["max_norm"] = float(norms.quantile(0.9))  # rows of a pass are then not known before the model has run
    full = whole(model, tmp_path / "full", CHATS, hook, **options)
    with rolling(model, tmp_path / "cache", CHATS, hook, **options) as cache:
        batches = read(cache, 32, grads=options["gradients"])
        check_stream(cache, full, batches, 32)
        if options["gradients"]:
            order = np.concatenate(
                expected_rows(full, cache.record.start, [s.passes for s in cache.record.segments], 0)
            )
            want = full.read(torch.from_numpy(order[: len(batches) * 32]), grads=True).grads
            assert want is not None
            assert torch.equal(torch.cat([batch.grads for batch in batches]), want)


def test_a_changed_model_or_setting_is_refused(model: Any, tmp_path: Path) -> None:
    with rolling(model, tmp_path / "cache") as cache:
        next(iter(cache.batches(48)))
    other = llama(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="already exists"):
        rolling(model, tmp_path / "cache")
    with pytest.raises(UserError, match="cannot resume"):
        rolling(other, tmp_path / "cache", resume=True)
    with pytest.raises(UserError, match="begun with tokens=4000, not 900"):
        rolling(model, tmp_path / "cache", resume=True, tokens=900)
    with rolling(model, tmp_path / "cache", resume=True, cache_gb=0.002) as cache:  # more room changes nothing
        assert len(read(cache)) == 4000 // 48
    with rolling(model, tmp_path / "cache", overwrite=True, tokens=900) as cache:
        assert cache.n_split("train") == 900
        assert cache.record.segments == []


def test_bad_input_is_refused_in_one_line(model: Any, tmp_path: Path) -> None:
    def refused(message: str, folder: str = "cache", **options: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            rolling(model, tmp_path / folder, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / folder).exists()

    refused("two shuffle windows of 640 tokens .* --window-tokens", cache_gb=0.0005, window_tokens=640)
    refused("two shuffle windows of .* tokens", cache_gb=1e-6, window_tokens=None)
    refused("held_out=0.2 is a share of a whole cache", held_out=0.2)
    refused("cache_gb=0 must be above 0", cache_gb=0)
    refused("sample_tokens=0 must be at least 1", sample_tokens=0)
    with pytest.raises(UserError, match="no local folder"):
        rolling(model, "memory://bucket/cache")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="ended after"):
        rolling(model, tmp_path / "short", from_documents([tiny_lm.sentences(60, 0)]))


def test_the_training_rows_are_a_stream(model: Any, tmp_path: Path) -> None:
    with rolling(model, tmp_path / "cache") as cache:
        for ask in (cache.split_rows, cache.documents, lambda split: next(cache.head(split=split))):
            with pytest.raises(UserError, match="are a stream"):
                ask("train")
        with pytest.raises(UserError, match="read once"):
            list(cache.batches(8, epoch=1))
        with pytest.raises(UserError, match="read several times"):
            cache.with_validation(0.1)
        with pytest.raises(UserError, match="a rolling cache has one"):
            cache.with_target(cache.kept)
        assert len(next(cache.head(5)).rows) == 5
    with pytest.raises(UserError, match="is closed"):
        next(cache.batches(8))


def test_one_long_document_is_shared(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with rolling(model, tmp_path / "cache", from_documents([tiny_lm.sentences(1500, 3)])) as cache:
        assert cache.record.shares_document
        assert cache.rolled["shares_document"]
    assert "longer than all that is kept" in caplog.text


def test_windows_of_a_size_that_is_chosen() -> None:
    """A billion tokens in 50 GB: two windows, the kept documents and nothing else."""
    config = RollingConfig(tokens=10**9, cache_gb=50, pass_tokens=2048)
    sample, held_out = config.kept_passes()
    assert (sample * 2048, held_out * 2048) == (131_072, 1_048_576)
    window = config.window(2304, kept_bytes=config.bytes_of(sample + held_out, 2304, 90))
    assert 2 * window.bytes <= config.limit
    assert window.passes * 2048 > 4e6
    small = RollingConfig(tokens=10**6, cache_gb=50, pass_tokens=2048).window(576, 10**9)
    assert 0.9 < small.passes * 2048 / 524_288 < 1.1
