"""Sentences in several scripts, and tokenizers of the three common kinds trained on the spot."""

from __future__ import annotations

import json
from typing import Any

SENTENCES = {
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "Polish": "Zażółć gęślą jaźń, źdźbło trawy i łódź na wodzie.",
    "Arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
    "emoji": "fine 👩🏽‍🚀 and 🇵🇱 and ❤️‍🔥 done",
    "English": "the cat sat on a mat while rain fell over old roofs",
    "replaced": "a text that has \ufffd in it",
}
KINDS = ("byte-level", "byte fallback", "word piece")


def train(kind: str) -> Any:
    """A tokenizer that knows English; of the others only their bytes, but for word pieces, which have no bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    english = [SENTENCES["English"]] * 9
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=330, initial_alphabet=letters, special_tokens=["<s>"])
        # A few merges within characters, and over their borders, as large vocabularies have.
        backend.train_from_iterator([*english, *[SENTENCES["Japanese"][:9]] * 4], trainer)
    elif kind == "byte fallback":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", "<s>", *fallback])
        backend.train_from_iterator(english, trainer)
        # The trainer takes them for special tokens, which they are not.
        content = json.loads(backend.to_str())
        content["added_tokens"] = content["added_tokens"][:2]
        backend = Tokenizer.from_str(json.dumps(content))
    else:
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "<s>"])
        backend.train_from_iterator(list(SENTENCES.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
