"""Text to token ids: one BOS token in front, padding on the left, every token readable where it stands."""

from __future__ import annotations

import copy

import pytest

from saelab.errors import UserError
from saelab.lm.tokens import decode_each, token_ids, tokenize, tokenizer_of, vocabulary
from tests.steering.models import llama, tokenizer


def test_one_bos_token_in_front() -> None:
    own = copy.deepcopy(tokenizer())
    plain = token_ids(own, "w5 w6", bos=False)
    assert token_ids(own, "w5 w6") == [own.bos_token_id, *plain]
    assert token_ids(own, f"{own.bos_token} w5 w6") == [own.bos_token_id, *plain]  # a chat template wrote it already
    own.bos_token = None
    assert token_ids(own, "w5 w6") == plain


def test_texts_are_padded_on_the_left() -> None:
    own = tokenizer()
    ids, mask = tokenize(own, ["w5", "w5 w6 w7"])
    assert ids.shape == mask.shape == (2, 4) and mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert ids[0, 2:].tolist() == token_ids(own, "w5")
    with pytest.raises(UserError, match="at least one token"):
        tokenize(own, [])


def test_tokens_read_as_they_stand() -> None:
    own = tokenizer()
    ids = token_ids(own, "w5 w6", bos=False)
    assert "".join(decode_each(own, ids)) == own.decode(ids)
    assert len(vocabulary(own)) == max(own.get_vocab().values()) + 1


def test_a_model_without_tokenizer_is_named() -> None:
    assert tokenizer_of(llama(), own := tokenizer()) is own
    with pytest.raises(UserError, match="carries no tokenizer; give tokenizer="):
        tokenizer_of(llama())
