"""Small random language models in Hugging Face layout, with a byte-level tokenizer, for tests without a hub.

``save_llama`` and ``save_gpt2`` write a model and its tokenizer into a folder, which every loader of saelab and of
transformers opens. Width 16, 3 or 4 layers; weights are enlarged, so that each layer changes the activations. The same
``seed`` gives the same weights. ``sentences`` makes text that the tokenizer splits into whole words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = """the cat sat on a mat while rain fell over old roofs and seven ships left the quiet
harbour at dawn""".split()  # noqa: SIM905


def sentences(n: int, seed: int = 0) -> str:
    """Nonsense text of ``n`` words."""
    picks = torch.randint(len(WORDS), (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in picks)


def tokenizer(bos: str | None = "<s>") -> Any:
    """A byte-level BPE of 320 tokens with BOS ``<s>`` (0), or none, and EOS ``</s>`` (1)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([sentences(500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>")


def save_llama(folder: Path, seed: int = 0, **options: int) -> Path:
    """A Llama with grouped key heads in ``folder``; ``options`` replace sizes of its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=320, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, **sizes | options)
    return _save(LlamaForCausalLM, config, folder, seed)


def save_gpt2(folder: Path, seed: int = 0) -> Path:
    """A GPT-2 with learned positions, at most 64 tokens, in ``folder``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    return _save(GPT2LMHeadModel, config, folder, seed)


def save_qwen2(folder: Path, seed: int = 0) -> Path:
    """A Qwen 2 with tied embeddings and a tokenizer without BOS token in ``folder``."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": 1}
    config = Qwen2Config(vocab_size=320, num_key_value_heads=2, tie_word_embeddings=True, **ends, **sizes)
    return _save(Qwen2ForCausalLM, config, folder, seed, bos=None)


def save_gemma3(folder: Path, seed: int = 0) -> Path:
    """A text-only Gemma 3 (norms before and after each sublayer, tied and scaled embeddings) in ``folder``."""
    from transformers import Gemma3ForCausalLM

    return _save(Gemma3ForCausalLM, _gemma3_text(), folder, seed)


def save_gemma3_multimodal(folder: Path, seed: int = 0) -> Path:
    """A Gemma 3 with a vision tower, without preprocessor, in ``folder``."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2}
    vision = SiglipVisionConfig(image_size=28, patch_size=14, **sizes)
    ids = {"boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=_gemma3_text().to_dict(), vision_config=vision.to_dict(), **ids)
    return _save(Gemma3ForConditionalGeneration, config, folder, seed)


def _gemma3_text() -> Any:
    from transformers import Gemma3TextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    attention = {"head_dim": 4, "num_key_value_heads": 2, "sliding_window": 32, "query_pre_attn_scalar": 4}
    return Gemma3TextConfig(vocab_size=320, **ends, **sizes, **attention)


def _save(cls: Any, config: Any, folder: Path, seed: int, bos: str | None = "<s>") -> Path:
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():  # large enough that layers matter
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer(bos).save_pretrained(folder)
    return folder
