"""Processes that share the tokenising pack the same contexts as one, and each tokenises its own part of the text."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saelab.data import tokenized
from saelab.data.packing import pack
from saelab.data.text.source import TextSource, counted
from saelab.data.tokenized import Division
from saelab.errors import UserError
from tests import tiny_lm
from tests.data.test_chat import INST, tokenizer

USER = {"role": "user", "content": "the cat sat on a mat"}
ANSWER = {"role": "assistant", "content": "rain fell over old roofs"}


def source() -> TextSource:
    """Documents in pieces, chats that the template takes or refuses, and records that the reader leaves out."""

    def read(left_out: Counter[str]) -> Any:
        for number in range(40):
            yield True, tiny_lm.sentences(30 + number, number)
            if number % 3 == 0:
                yield False, tiny_lm.sentences(25, 100 + number)
            if number % 4 == 0:
                yield True, [USER, ANSWER] * (number % 7 + 1)
            if number % 5 == 0:
                yield True, [ANSWER]
            if number % 2 == 0:
                left_out["records without 'text'"] += 1

    return counted("memory", "0", read)


def together(size: int, work: Callable[[Division], Any]) -> list[Any]:
    """What ``work`` gives in each of several threads that exchange bytes, or the error that it raises."""
    barrier, board = threading.Barrier(size), [b""] * size
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        def exchange(data: bytes) -> list[bytes]:
            board[rank] = data
            barrier.wait(60)
            all_of_them = list(board)
            barrier.wait(60)
            return all_of_them

        try:
            found[rank] = work(Division(rank, size, exchange))
        except UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=run, name=str(rank), args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


@pytest.mark.parametrize(("size", "most", "wanted"), [(2, None, 200), (3, 17, 200), (3, None, 12)])
def test_the_parts_make_the_same_contexts(
    monkeypatch: pytest.MonkeyPatch, size: int, most: int | None, wanted: int
) -> None:
    own = tokenizer(INST)
    monkeypatch.setattr(tokenized, "GROUP", 600)
    work, texts = tokenized._encoded, [Counter[str]() for _ in range(size)]

    def contexts(division: Division | None) -> Any:
        left_out: Counter[str] = Counter()
        options = {} if division is None else {"division": division}
        parts = pack(source(), own, 16, "none", 2, "</s>", most, left_out=left_out, **options)
        first = [part for part, _ in zip(parts, range(wanted))]
        return [torch.cat(columns) for columns in zip(*first)], dict(left_out)

    expected, without = contexts(None)
    assert len(expected[0]) > 10 and len(without) == 2

    def counted_work(group: Any, tokenizer: Any) -> Any:
        texts[int(threading.current_thread().name)]["pieces"] += len(group)
        return work(group, tokenizer)

    monkeypatch.setattr(tokenized, "_encoded", counted_work)
    for columns, left_out in together(size, contexts):
        assert all(torch.equal(a, b) for a, b in zip(columns, expected)) and left_out == without
    if wanted == 200:  # every piece was tokenised once, by one of them
        accepted = sum(1 for _, piece in source().pieces() if piece != [ANSWER])
        assert sum(count["pieces"] for count in texts) == accepted
        assert all(count["pieces"] > 0 for count in texts)


def test_a_part_that_cannot_be_tokenised_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "GROUP", 600)
    plain = tokenizer(None)
    found = together(2, lambda division: list(pack(source(), plain, 16, "none", 2, division=division)))
    assert found[0] == found[1] and "has no chat template" in found[0]
