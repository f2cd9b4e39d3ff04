"""Text to token ids: one BOS token in front, padding on the left, every token readable where it stands."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from saelab.data.packing import pack
from saelab.data.text import from_documents
from saelab.errors import UserError
from saelab.lm.tokens import decode_each, token_ids, tokenize, tokenizer_of, vocabulary
from tests import tiny_lm
from tests.steering.models import llama, tokenizer


def test_one_bos_token_in_front() -> None:
    own = copy.deepcopy(tokenizer())
    plain = token_ids(own, "w5 w6", bos=False)
    assert token_ids(own, "w5 w6") == [own.bos_token_id, *plain]
    assert token_ids(own, f"{own.bos_token} w5 w6") == [own.bos_token_id, *plain]  # a chat template wrote it already
    own.bos_token = None
    assert token_ids(own, "w5 w6") == plain


def test_a_text_begins_with_the_token_that_its_tokenizer_puts_there() -> None:
    """As of XGLM and BioGPT, which have a BOS token and begin with another."""
    from tokenizers import processors

    own: Any = tiny_lm.tokenizer()
    plain = token_ids(own, "the cat", bos=False)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    assert own("the cat")["input_ids"] == token_ids(own, "the cat") == [1, *plain]
    first = next(pack(from_documents([tiny_lm.sentences(40)]), own, 8, "context", 1)).tokens
    assert first[:, 0].tolist() == [1]
    own.bos_token = None
    assert token_ids(own, "the cat") == plain


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


def test_a_tokenizer_that_cannot_read_a_text_is_one_line(tmp_path: Path) -> None:
    """One of whole words without a token for the others: its library raises a bare Exception."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: Any = Tokenizer(models.WordLevel({"cat": 0, "sat": 1, "\n": 2}, unk_token=None))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert token_ids(tokenizer, "cat sat") == [0, 1]
    assert list(vocabulary(tokenizer)) == ["cat", "sat", "\n"]
    with pytest.raises(UserError, match="cannot read this text"):
        token_ids(tokenizer, "the cat")
    for separator, match in (("none", "cannot read this text"), ("and", "no token for the separator 'and'")):
        with pytest.raises(UserError, match=match):
            list(pack(from_documents(["a dog"] * 20), tokenizer, 4, "none", 1, separator))
