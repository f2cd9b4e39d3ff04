"""Processes that share the tokenising pack the same contexts as one, and each tokenises its own part of the text."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saelab.data import tokenized
from saelab.data.packing import Bos, Place, pack
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
        options: dict[str, Any] = {} if division is None else {"division": division}
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


# Several passes in a group of documents, or several groups in a pass.
@pytest.mark.parametrize(("bos", "most", "batch"), [("none", None, 1), ("context", None, 30), ("document", 17, 10)])
def test_packing_goes_on_from_any_place(
    monkeypatch: pytest.MonkeyPatch, bos: Bos, most: int | None, batch: int
) -> None:
    own = tokenizer(INST)
    monkeypatch.setattr(tokenized, "GROUP", 600)
    work, seen = tokenized._encoded, [0]

    def counted_work(group: Any, tokenizer: Any) -> Any:
        seen[0] += len(group)
        return work(group, tokenizer)

    monkeypatch.setattr(tokenized, "_encoded", counted_work)
    packed = pack(source(), own, 16, bos, batch, "</s>", most)
    places, parts = [packed.place], []
    for part in packed:
        parts.append(part)
        places.append(packed.place)
    total = sum(1 for _, piece in source().pieces() if piece != [ANSWER])
    assert seen[0] == total and len(parts) > 3
    for number, place in list(enumerate(places))[:: max(1, len(parts) // 4)]:
        seen[0] = 0
        rest = pack(source(), own, 16, bos, batch, "</s>", most, at=place)
        for part, expected in zip(rest, parts[number:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(part, expected))
        before = sum(1 for n, (_, piece) in enumerate(source().pieces()) if n < place.pieces and piece != [ANSWER])
        assert seen[0] == total - before
    assert places[-1].pieces > 30  # of about 70: the places move on with the text


def test_a_place_behind_the_end_of_a_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"ends after \d\d documents or parts of them, and 500 were read before"):
        next(pack(source(), tokenizer(INST), 16, "none", 2, at=Place(pieces=500)))
