"""Training, validation and held-out rows share no document, and old caches keep the rows that they had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.data.cache.merge import merge
from saelab.evaluation import EvaluateConfig, Evaluation, evaluate, spread
from saelab.evaluation.report import split_remark
from saelab.sae import build

CONTEXT = 8
NO_LM = EvaluateConfig(lm_tokens=0)


def cache_of(path: Path, lengths: list[int], held_out: float = 0.2, shard_rows: int = 1 << 16) -> ActivationCache:
    """Documents of these lengths, one after the other in contexts of 8 tokens, as a harvest packs them."""
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(len(documents), 4, generator=generator)
    return ActivationCache.from_tensors(
        path, acts, torch.arange(len(documents)), documents=documents, context_length=CONTEXT, held_out=held_out,
        shard_rows=shard_rows,
    )  # fmt: skip


def brute_force(documents: list[int], asked: int) -> tuple[int, int]:
    """All pairs of a last training context and a first held-out one, tried one by one."""
    contexts = [set(documents[i : i + CONTEXT]) for i in range(0, len(documents), CONTEXT)]
    n, found = len(contexts), []
    for start in range(1, n):
        for stop in (start, start - 1):
            if stop >= 1 and not set().union(*contexts[:stop]) & set().union(*contexts[start:]):
                found.append((abs(torch.tensor((n - start) / asked).log().item()), start - stop, stop, start))
                break
    return min(found)[2:] if found else (n - asked, n - asked)


@pytest.mark.parametrize("shard_rows", [16, 1 << 16])
@pytest.mark.parametrize("seed", range(12))
def test_whole_documents_are_held_out(seed: int, shard_rows: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, [5, 30, 90][seed % 3], (12,), generator=generator).tolist()
    cache = cache_of(tmp_path / "cache", lengths, shard_rows=shard_rows)
    documents = cache.documents().tolist()
    n = cache.manifest.n_contexts
    stop, start = brute_force(documents, max(1, round(0.2 * n)))
    assert cache.split_rows("train") == (0, stop * CONTEXT)
    assert cache.split_rows("held_out") == (start * CONTEXT, len(documents))
    train, held_out = (set(cache.documents(split).tolist()) for split in ("train", "held_out"))
    assert train and held_out and not train & held_out
    x = torch.cat([batch.acts for batch in cache.head(split="train")]).double()
    mean = torch.tensor(cache.manifest.mean, dtype=torch.float64)
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-12, atol=1e-12)


def test_validation_rows_are_of_their_own_documents_too(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache", [13] * 40).with_validation(0.2)
    splits = {name: set(cache.documents(name).tolist()) for name in ("train", "validation", "held_out")}
    assert all(splits.values()) and sum(map(len, splits.values())) == len(set().union(*splits.values()))
    assert 4 <= len(splits["validation"]) <= 9
    view = cache.with_validation_from(100)
    assert view.split_rows("train") == (0, 100) and view.split_rows("validation")[0] == 100


@pytest.mark.parametrize("lengths", [[160], [1, 159], [155, 5]])
def test_text_that_cannot_be_divided_by_documents_is_divided_by_contexts_and_says_so(
    lengths: list[int], tmp_path: Path
) -> None:
    cache = cache_of(tmp_path / "cache", lengths)
    assert cache.split_rows("train") == (0, 128) and cache.split_rows("held_out") == (128, 160)
    found = evaluate(build("topk", 4, 8, k=2), cache, config=NO_LM)
    remark = split_remark(found)
    assert remark is not None and "have training rows too" in remark
    if found.settings["documents"] == 1:
        assert found.metrics["fvu"].low is None and "too few to resample" in found.metrics["fvu"].interval


def test_a_long_last_document_that_takes_the_training_rows_is_remarked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(tmp_path / "long", [40, 120], held_out=0.1)
    assert cache.split_rows("held_out") == (48, 160)
    assert "14 of the 20 contexts are held out, where 2 were asked for" in caplog.text
    caplog.clear()
    cache_of(tmp_path / "short", [120, 40], held_out=0.1)
    assert not caplog.text


def test_caches_written_before_keep_their_split_and_say_what_it_cannot_give(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache", [13] * 37)
    path, sae = tmp_path / "cache" / "manifest.json", build("topk", 4, 8, k=2)
    manifest = json.loads(path.read_text())
    assert cache.manifest.train_until == cache.manifest.held_out_from - CONTEXT
    assert split_remark(evaluate(sae, cache, config=NO_LM)) == split_remark(_evaluated(7, 0))
    del manifest["train_until"]  # as before 0.2.0
    path.write_text(json.dumps(manifest | {"held_out_from": 384}))
    old = ActivationCache(tmp_path / "cache")
    assert old.split_rows("train") == (0, 384) and old.split_rows("held_out") == (384, 481)
    assert old.fingerprint != cache.fingerprint
    remark = split_remark(evaluate(sae, old, config=NO_LM))
    assert remark is not None and "1 of the 8 held-out documents have training rows" in remark


def test_a_merged_cache_is_divided_again(tmp_path: Path) -> None:
    parts = [cache_of(tmp_path / name, [13] * 20) for name in "ab"]
    whole = merge(parts, tmp_path / "c")
    train, held_out = (set(whole.documents(split).tolist()) for split in ("train", "held_out"))
    assert not train & held_out and min(held_out) >= 30


def test_intervals_resample_documents(tmp_path: Path) -> None:
    """Rows of a document are copies of one: more of them tell nothing, and the interval must not shrink."""
    generator, widths = torch.Generator().manual_seed(1), []
    base = torch.randn(60, 4, generator=generator)
    sae = build("topk", 4, 8, k=1)
    for copies in (1, 16):
        acts = base.repeat_interleave(copies * CONTEXT, 0)
        documents = torch.arange(60).repeat_interleave(copies * CONTEXT)
        cache = ActivationCache.from_tensors(
            tmp_path / str(copies), acts, documents=documents, context_length=CONTEXT, held_out=0.5
        )
        e = evaluate(sae, cache, config=NO_LM).metrics["fvu"]
        assert "over 30 documents" in e.interval and e.low is not None and e.high is not None
        widths.append(e.high - e.low)
    assert widths[1] == pytest.approx(widths[0], rel=1e-6)


def test_contexts_for_the_language_model_come_from_the_whole_split(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache", [16] * 100, held_out=0.5)
    chosen = spread(cache, "held_out", 10 * CONTEXT)
    rows = [int(rows[0]) for _, rows in chosen]
    first, stop = cache.split_rows("held_out")
    assert len(chosen) == 10 and rows == sorted(rows)
    gaps = torch.tensor([first, *rows, stop]).diff()
    assert gaps.max() <= (stop - first) / 10 + CONTEXT and gaps.min() >= (stop - first) / 20 - CONTEXT
    assert len(spread(cache, "held_out", 10**9)) == (stop - first) // CONTEXT


def test_few_documents_are_remarked() -> None:
    assert split_remark(_evaluated(19, 0)) is not None
    assert split_remark(_evaluated(20, 0)) is None


def _evaluated(documents: int, trained: int) -> Evaluation:
    return Evaluation({}, {}, {"split": "held_out", "documents": documents, "documents_trained_on": trained})


def test_the_rows_that_cache_info_prints_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_of(tmp_path / "between", [60, 20])  # the second document begins in the middle of a context
    cache_of(tmp_path / "apart", [64, 16])
    for name, shared in {"between": 8, "apart": 0}.items():
        main(["cache", "info", str(tmp_path / name), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["rows_in_neither"] == shared
        assert found["train_rows"] + found["held_out_rows"] + shared == found["rows"] == 80
    main(["cache", "info", str(tmp_path / "between")])
    assert "8 (of the context where the held-out documents begin)" in " ".join(capsys.readouterr().out.split())
