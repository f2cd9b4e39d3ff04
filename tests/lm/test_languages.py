"""Tokens read as text in every script: joined they are the text, and no character is replaced."""

from __future__ import annotations

from typing import Any

import pytest

from saelab.lm.tokens import decode_each, token_text, vocabulary, written_text
from saelab.vocabulary import Vocabulary
from tests.lm.languages import KINDS, SENTENCES, train


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return train(request.param)


@pytest.mark.parametrize("language", SENTENCES)
def test_joined_tokens_are_the_text(tokenizer: Any, language: str) -> None:
    text = SENTENCES[language]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert decoded.replace(" ", "") == text.replace(" ", "")  # word pieces lose spaces around punctuation
    known = Vocabulary.from_json(vocabulary(tokenizer).to_json())
    for strings in (decode_each(tokenizer, ids), known.side_by_side(ids)):
        assert len(strings) == len(ids)
        assert "".join(strings).removeprefix(" ") == decoded
        assert "".join(strings).count("\ufffd") == text.count("\ufffd")
        assert all(text.count(part.strip()) for part in strings)
    assert decode_each(tokenizer, ids)[1:] == known.side_by_side(ids)[1:]


@pytest.mark.parametrize("language", ["Japanese", "Hindi", "emoji"])
def test_a_cut_text_shows_the_bytes_that_are_left(tokenizer: Any, language: str) -> None:
    ids = tokenizer(SENTENCES[language], add_special_tokens=False)["input_ids"]
    known = vocabulary(tokenizer)
    for start in range(0, len(ids) - 8, 3):
        cut = ids[start : start + 7]
        assert "\ufffd" not in "".join(known.side_by_side(cut))
        assert "\ufffd" not in "".join(decode_each(tokenizer, ids[: start + 1]))
    assert "\ufffd" not in "".join(token_text(tokenizer, number) for number in ids)
    assert not any("\ufffd" in text for number, text in enumerate(known) if number in ids)


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    own = train("byte fallback")
    ids = own("猫a", add_special_tokens=False)["input_ids"]
    known = vocabulary(own)
    assert known.side_by_side(ids)[-4:] == decode_each(own, ids)[-4:] == ["", "", "猫", "a"]
    parts = tuple(ids[-4:-1])
    assert known.run(parts) == (["", "", "猫"], ["猫"] * 3)
    assert [known[number] for number in parts] == ["<E7>", "<8C>", "<AB>"]
    assert known.side_by_side(parts[1:]) == ["", "<8C AB>"]
    assert known.side_by_side([*parts[:2], ids[-1]]) == ["", "<E7 8C>", "a"]
    across = Vocabulary(["", ""], {0: "猫".encode()[:2], 1: "猫".encode()[2:] + "の".encode()[:1]})
    assert across.run((0, 1)) == (["", "猫<E3>"], ["猫", "猫<E3>"])


@pytest.mark.parametrize("language", SENTENCES)
def test_a_generation_grows_by_whole_characters(tokenizer: Any, language: str) -> None:
    ids = tokenizer(SENTENCES[language], add_special_tokens=False)["input_ids"]
    whole, before = tokenizer.decode(ids), ""
    for stop in range(len(ids) + 1):
        text = written_text(tokenizer, ids[:stop])
        assert text.startswith(before) and whole.startswith(text)
        before = text
    assert before == whole


def test_word_pieces_have_their_space() -> None:
    own = train("word piece")
    known = vocabulary(own)
    pieces = own.convert_ids_to_tokens(list(range(len(known))))
    for piece, text in zip(pieces[2:], known[2:]):
        assert text.strip() == piece.removeprefix("##")
        if piece[0].isalpha() and piece.isascii():
            assert text.startswith(" ")


def test_vocabularies_of_0_1_0_and_damaged_ones() -> None:
    assert list(Vocabulary.from_json('["a", "\\ufffd"]')) == ["a", "\ufffd"]
    for broken in ('{"a": 1}', "[[300]]", "[[-1]]", '[["x"]]', "3"):
        with pytest.raises((ValueError, TypeError)):
            Vocabulary.from_json(broken)
