"""The benchmark of labels reads them as text and scores them as brute force does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab.bench.labels import Firings, Reader, score
from saelab.data.cache import ActivationCache
from saelab.features.indexing.labels import REACH

CONTEXT, N = 32, 40 * 32


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("labels")
    tokens = torch.randint(0, 30, (N,), generator=torch.Generator().manual_seed(0))
    ActivationCache.from_tensors(
        folder / "cache", torch.randn(N, 4), tokens, context_length=CONTEXT, vocabulary=[f" w{i}" for i in range(30)]
    )
    return Reader(ActivationCache(folder / "cache"), folder / "corpus")


@pytest.mark.parametrize("label", ["token: w3 · w5", "after: w4", "before: w6", "phrase: w1 w2 · w2 w1", "near: w8"])
def test_a_label_predicts_what_it_says(reader: Reader, label: str) -> None:
    words, kind = reader.corpus.text[:N].reshape(-1, CONTEXT), label.split(":")[0]
    numbers = [[int(w[1:]) for w in part.split()] for part in label.split(": ")[1].split(" · ")]
    expected = np.zeros_like(words, dtype=bool)
    for c, p in np.ndindex(words.shape):
        line = words[c].tolist()
        met = {
            "token": line[p : p + 1],
            "after": line[p - 1 : p] if p else [],
            "before": line[p + 1 : p + 2],
            "near": line[max(p - REACH + 1, 0) : p + 1],
            "phrase": line[p - 1 : p + 1] if p else [],
        }[kind]
        expected[c, p] = met in numbers if kind == "phrase" else any([w] in numbers for w in met)
    assert expected.any()
    assert reader.predicted(label).tolist() == np.flatnonzero(expected.ravel() & reader.held_out).tolist()


def test_the_scores_count_what_they_say(reader: Reader) -> None:
    rows = reader.predicted("token: w3")
    other = np.setdiff1d(np.flatnonzero(reader.held_out), rows)[:: len(rows)]
    firings = Firings(np.sort(np.concatenate([rows, other])), np.ones(len(rows) + len(other), np.float32))
    found = score(reader, "token: w3", firings)
    recall = len(rows) / (len(rows) + len(other))
    assert found["f1"] == pytest.approx(2 * recall / (1 + recall)) == found["f1_mass"]
    firings.sizes[np.isin(firings.rows, rows)] = 100.0
    assert score(reader, "token: w3", firings)["f1_mass"] > found["f1"]
    assert score(reader, "token: w3", firings)["strongest"] == 1.0
    assert score(reader, "token: w4", firings)["strongest"] == 0.0
    assert score(reader, "", firings) == {
        "f1": 0, "f1_mass": 0, "detection": 0.5, "detection_strong": 0.5, "strongest": 0
    }  # fmt: skip
