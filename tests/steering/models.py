"""One small Llama for the steering tests, as a plain model and as a bridge, both on the same weights.

It has three layers and a vocabulary of words. Its weights are larger than usual, so that generated tokens vary. Every
function is cached: all tests of a process share the models, so a test must leave no hook and no change behind.
"""

from __future__ import annotations

import tempfile
from functools import cache

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saelab.lm import load_model

HOOK = "blocks.1.hook_resid_post"
D_MODEL, VOCABULARY = 32, 97


@cache
def folder() -> str:
    """A saved model of three layers with its tokenizer: words ``w4 .. w96``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # with the usual 0.02 every continuation is one token repeated
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {name: i for i, name in enumerate([*special.values(), *(f"w{i}" for i in range(4, VOCABULARY))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tempfile.mkdtemp(prefix="saelab-tiny-llama-")
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Of both models: splits at white space and knows the words ``w4 .. w96``."""
    return PreTrainedTokenizerFast.from_pretrained(folder())


@cache
def llama() -> LlamaForCausalLM:
    """The plain Hugging Face model."""
    return LlamaForCausalLM.from_pretrained(folder()).eval()


@cache
def bridge() -> TransformerBridge:
    """The same weights in a TransformerLens bridge."""
    return load_model(folder(), device="cpu")
