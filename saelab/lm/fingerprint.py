"""Telling models and tokenizers apart by content."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saelab.lm.unwrapped import hf_tensors, plain_skeleton

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_SAMPLE = 1024  # values of each parameter that enter the fingerprint


def weights_fingerprint(model: TransformerBridge | nn.Module) -> str:
    """Hash of names, shapes and evenly spaced values of all parameters; a bridge and the plain Hugging Face model
    with the same weights have the same.

    Reads a thousandth of the weights, so it is quick on large models; any training step moves nearly every weight
    and so changes it. Weights loaded in another dtype are different weights.
    """
    digest = hashlib.sha256()
    tensors, skeleton = hf_tensors(model), plain_skeleton(model)
    names = sorted(tensors) if skeleton is None else [name for name, _ in skeleton.named_parameters()]
    for name in names:
        parameter = tensors[name]
        flat = parameter.detach().flatten()
        picks = torch.linspace(0, flat.numel() - 1, min(_SAMPLE, flat.numel()), dtype=torch.float64).long()
        values = flat[picks.to(flat.device)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + values)
    return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def token_strings(tokenizer: Any) -> list[str]:
    """How each token id reads; a token that is part of a character reads as the replacement character."""
    size = max(tokenizer.get_vocab().values()) + 1
    texts = tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    # SentencePiece vocabularies mark a leading space, which decoding a token on its own strips.
    return [
        f" {text}" if (piece or "").startswith("▁") and not text.startswith(" ") else text
        for text, piece in zip(texts, pieces)
    ]
