"""Fingerprints that tell models and tokenizers apart by their content."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saelab.lm.unwrapped import hf_tensors, plain_skeleton

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Largest relative gap between two runs of one model, which may have been in bfloat16. A rounding to its 8 bits has a
# standard deviation of 2^-9 / sqrt(3) of the value, and the residual stream is rounded twice in each block: over 80
# blocks, in each of two runs, independent errors add up to sqrt(2 * 2 * 80) * 2^-9 / sqrt(3) = 0.02. In float32 what
# differs is the order in which attention kernels sum: 2e-5 was measured over ten blocks.
SAME_MODEL = 0.02
_SAME_IN_FLOAT32 = 1e-3
_SAMPLE = 1024  # values of each parameter that enter the fingerprint


def weights_fingerprint(model: TransformerBridge | nn.Module) -> str:
    """Hash of names, shapes and evenly spaced values of all parameters; a bridge and the plain Hugging Face model
    with the same weights have the same.

    It reads a thousandth of the weights, so it is quick on large models; a training step moves nearly every weight and
    so changes it. The same weights in another dtype have another fingerprint.
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


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` of two tensors on any devices; infinite where their shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.cpu().float(), expected.cpu().float()
    return float((found - expected).norm() / expected.norm())


def same_activations(found: Tensor, expected: Tensor) -> bool:
    """Whether activations of the same text come from the same weights, by the precision they were computed in."""
    limit = _SAME_IN_FLOAT32 if found.dtype in (torch.float32, torch.float64) else SAME_MODEL
    return relative_gap(found, expected) <= limit


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that determines how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]
