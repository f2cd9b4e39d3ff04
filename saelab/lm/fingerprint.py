"""Fingerprints of weights and tokenizers, and the gaps between activations that rounding explains."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saelab.lm.offload import tied_names, whole
from saelab.lm.structure import WRAPPED, underlying

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_SAMPLE = 1024  # values of each parameter that enter the fingerprint
_PACKED = ("qweight", "qzeros", "scales")  # buffers in which GPTQ and AWQ keep what other models keep in parameters
# Rows that may lie beyond twice the tolerance: a router in bfloat16 sends a few tokens to other experts.
_STRAYS = 0.1


def weights_fingerprint(model: TransformerBridge | nn.Module, rounded_to: torch.dtype | None = None) -> str:
    """Hash of names, shapes and evenly spaced values of all parameters; a bridge and the plain Hugging Face model
    with the same weights have the same, and so has one that is spread over devices, disk or processes.

    It reads a thousandth of the weights, so it is quick on large models; a training step moves nearly every weight and
    so changes it. With ``rounded_to`` it is the fingerprint that the weights have after conversion to that dtype.
    Quantised weights count as what they stand for. Where processes share the weights, all of them must call this.
    """
    return weights_fingerprints(model, [rounded_to])[0]


def weights_fingerprints(model: TransformerBridge | nn.Module, rounded_to: Sequence[torch.dtype | None]) -> list[str]:
    """:func:`weights_fingerprint` for each of several dtypes, with one reading of the weights: those of an offloaded
    model come from the disk."""
    digests = [hashlib.sha256() for _ in rounded_to]
    for name, tensor in named_weights(model):
        values = _sampled(tensor)
        for digest, dtype in zip(digests, rounded_to):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + _bytes(values, dtype))
    return [digest.hexdigest()[:16] for digest in digests]


def named_weights(model: TransformerBridge | nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by Hugging Face name, each tensor once, in the order in which the modules hold them.

    Quantised layers that keep their weights elsewhere (packed, or in buffers) are included. Of a model that is spread
    over disk or processes, the whole tensors (see :func:`saelab.lm.offload.whole`).
    """
    root = underlying(model)
    for path, leaf, tensor in _tensors(model):
        yield f"{path}.{leaf}".lstrip("."), whole(root, path, leaf, tensor)


def _tensors(model: TransformerBridge | nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Path of the module, name in it, and tensor as the module holds it."""
    tied, seen_names = tied_names(model), set[str]()
    seen: dict[int, Tensor] = {}  # it keeps them, because the number of a tensor that is gone may be given again

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, str, Tensor]]:
        # A component of a bridge stands for the model's own module, which it keeps inside.
        while WRAPPED in module._modules:
            module = module.get_submodule(WRAPPED)
        for leaf, tensor in _own_weights(module):
            name = f"{path}.{leaf}".lstrip(".")
            same = tied.get(name, name) if tensor.is_meta else ""
            if id(tensor) not in seen and same not in seen_names:
                seen[id(tensor)] = tensor
                seen_names.update({same} - {""})
                yield path.lstrip("."), leaf, tensor
        for key, child in module._modules.items():
            if child is not None:
                yield from visit(child, f"{path}.{key}")

    yield from visit(underlying(model), "")


def _own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for leaf, tensor in module._parameters.items():
        if tensor is not None:
            yield leaf, tensor
    for leaf, tensor in module._buffers.items():
        if leaf in _PACKED and tensor is not None:
            yield leaf, tensor
    weight: Any = getattr(module, "weight", None)
    if callable(weight) and "quantized" in type(module).__module__:  # torch's own int8 layers give it by a method
        packed: Any = weight()
        yield "weight", packed


def _sampled(tensor: Tensor) -> Tensor:
    """Evenly spaced values of a tensor of any kind, on the CPU."""
    flat = _plain(tensor.detach()).flatten()
    picks = torch.linspace(0, flat.numel() - 1, min(_SAMPLE, flat.numel()), dtype=torch.float64).long()
    return flat[picks.to(flat.device)].cpu()


def _bytes(values: Tensor, rounded_to: torch.dtype | None) -> bytes:
    if rounded_to is not None and values.is_floating_point():
        values = values.to(rounded_to)
    return values.float().numpy().tobytes()


def _plain(tensor: Tensor) -> Tensor:
    """An ordinary tensor in place of a quantised one, which may not be indexed."""
    if tensor.is_quantized or (type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "dequantize")):
        try:
            return tensor.dequantize()
        except (RuntimeError, NotImplementedError, TypeError):
            return tensor  # bitsandbytes' packed integers are tensors of their own class, and can be indexed
    return tensor


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of most of its floating-point parameters."""
    counts: dict[torch.dtype, int] = {}
    for parameter in underlying(model).parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def is_quantised(model: nn.Module) -> bool:
    """Whether some of a model's weights are integers, or stand for integers."""
    return any(tensor.is_quantized or not tensor.is_floating_point() for *_, tensor in _tensors(model))


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` of two tensors on any devices; infinite where their shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.cpu().float(), expected.cpu().float()
    return float((found - expected).norm() / expected.norm())


def row_gaps(found: Tensor, expected: Tensor) -> Tensor:
    """``|found - expected| / |expected|`` of each row of two tensors ``[..., d]`` of one shape; float32, on the CPU.

    Of the whole tensor it would be that of a few tokens of huge norm, and hide every other row.
    """
    found, expected = found.detach().cpu().float(), expected.detach().cpu().float()
    return (found - expected).norm(dim=-1).div(expected.norm(dim=-1).clamp_min(1e-30)).flatten()


def rounding_gap(dtype: torch.dtype, blocks: int, stored: torch.dtype | None = None) -> float:
    """The gap of a row that rounding explains between two runs of one model, up to a block's output.

    A rounding to p bits has a standard deviation near ``2^-(p + 1) / sqrt(3)`` of the value. Each block rounds the
    residual stream twice, in each of the two runs, and independent errors add up as the square root of their number.
    Roundings inside the blocks add to it, so this is four times that sum: in bfloat16 0.028 after ten blocks, where
    fused and eager attention were measured 0.01 apart in SmolLM2. Products in float32 are sums of thousands
    of terms in another order, which counts as six more bits. ``stored`` adds the rounding of a file.
    """
    size = torch.finfo(dtype).eps / 4 / math.sqrt(3)
    if dtype == torch.float32:
        size *= 64
        if torch.get_float32_matmul_precision() != "highest":  # TensorFloat-32 keeps 11 bits
            size = 2.0**-12 / math.sqrt(3)
    computed = 4 * size * math.sqrt(4 * max(blocks, 1))
    written = 0.0 if stored is None else 4 * torch.finfo(stored).eps / 4 / math.sqrt(3)
    return math.hypot(computed, written)


def same_activations(
    found: Tensor, expected: Tensor, blocks: int, dtype: torch.dtype | None = None, stored: torch.dtype | None = None
) -> bool:
    """Whether rounding explains the gaps between rows ``[..., d]`` of two runs, after so many blocks: half of the rows
    lie within :func:`rounding_gap`, and nine in ten within twice that.

    ``dtype`` is the coarser of the dtypes that the two ran in, by default that of ``found``; ``stored`` is the dtype
    of a file that ``expected`` was read from.
    """
    if found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    limit = rounding_gap(dtype or found.dtype, blocks, stored)
    gaps = row_gaps(found, expected)
    return float(gaps.median()) <= limit and float((~(gaps <= 2 * limit)).float().mean()) <= _STRAYS


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The one of two floating-point dtypes that rounds more."""
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that determines how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]
