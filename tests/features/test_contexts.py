"""Examples with their whole contexts, against the code of the whole corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.features import IndexConfig, build_index
from saelab.features.contexts import different_documents, whole_contexts
from tests.features.lookup import Lookup

CONTEXT, N = 16, 30 * 16


def test_a_whole_context_is_that_of_the_corpus(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (N,))
    code = torch.randn(N, 5) * (torch.rand(N, 5) < 0.2)
    acts = torch.zeros(N, 4)
    acts[:, 0] = torch.arange(N)
    cache = ActivationCache.from_tensors(
        tmp_path / "cache", acts, tokens, context_length=CONTEXT, shard_rows=7 * CONTEXT,
        vocabulary=[f" w{i}" for i in range(9)],
    )  # fmt: skip
    sae = Lookup(code)
    index = build_index(sae, cache, tmp_path / "run", config=IndexConfig(before=2, after=1))
    for pole in (1, -1):
        examples = index.examples(2, pole)
        for example, whole in zip(examples, whole_contexts(cache, sae, examples)):
            start = example.row - example.row % CONTEXT
            assert whole.tokens == tokens[start : start + CONTEXT].tolist()
            assert whole.text == "".join(f" w{t}" for t in whole.tokens)
            assert whole.activations == pytest.approx(code[start : start + CONTEXT, 2].tolist())
            assert start + whole.focus == example.row and whole.rank == example.rank
    with pytest.raises(UserError, match="no row"):
        whole_contexts(cache, sae, [replace(examples[0], row=N)])


def test_other_documents_come_before_more_of_one() -> None:
    from saelab.features import Example

    made = [
        Example(0, 1, "top", rank, rank, document, 1.0, [], [], [], 0)
        for rank, document in enumerate([5, 5, 5, 7, 9, 7])
    ]
    assert [e.rank for e in different_documents(made)] == [0, 3, 4, 1, 5, 2]
