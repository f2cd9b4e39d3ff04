"""The final norm and unembedding of a language model as plain tensors."""

from __future__ import annotations

import contextlib
import copy
import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.loading import load_hf_model
from saelab.lm.offload import device_of, weight_of, whole_copy
from saelab.lm.structure import blocks, modules, opened, text_config, underlying
from saelab.lm.unwrapped import plain_model

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Unembedding(NamedTuple):
    """``logits = (normalised x * norm_weight) @ weight``, up to biases and a soft cap.

    ``normalised`` divides by the root mean square of ``x``, after subtracting its mean where ``centred`` (LayerNorm).
    ``weight`` includes what lies between the norm and the logits: a projection (OPT-350m), a multiplier (Granite).
    """

    weight: Float[Tensor, "d_in vocab"]
    norm_weight: Float[Tensor, " d_in"] | None
    centred: bool


def unembedding(model: TransformerBridge | nn.Module | str | Path) -> Unembedding:
    """Unembedding matrix and final norm of a loaded model, or of one to load by name or folder; float32, on the CPU.

    The modules that follow the last block are found by running a few tokens, and the norm is probed, not recognised by
    its class. UserError where the model does something else there.
    """
    if isinstance(model, str | Path):
        found = unembedding(load_hf_model(model, device="cpu"))
        gc.collect()  # without this the rest of the model may stay in memory
        return found
    model = opened(model)
    plain = model if underlying(model) is model else plain_model(model)  # pyright: ignore[reportArgumentType]
    return _of_bridge(model) if plain is None else _of_plain(plain)


def _of_plain(model: nn.Module) -> Unembedding:
    tail = _run(model)
    weight = _matrix(model, tail.head).T * tail.scale
    norm_weight: Tensor | None = None
    centred, x, projections, normed = False, tail.start, [], False
    while not torch.equal(x, tail.head_input):
        module, y = next(((m, y) for m, given, y in tail.calls if torch.equal(given, x)), (None, x))
        if module is None or torch.equal(x, y):
            raise UserError(
                f"the logit lens cannot follow {type(model).__name__} from its last block to its logits; leave it out "
                "(--model none)"
            )
        if isinstance(module, nn.Linear):
            projections.append(_matrix(model, module).T)
        elif projections or normed:
            raise UserError(f"{type(model).__name__} has more than one norm at its end; leave the logit lens out")
        else:
            norm_weight, centred = _probe(whole_copy(model, module), x.shape[-1])
            norm_weight, normed = norm_weight if list(module.parameters()) else None, True
        x = y
    for matrix in reversed(projections):
        weight = matrix @ weight
    return Unembedding(weight.contiguous(), norm_weight, centred)


def _of_bridge(bridge: Any) -> Unembedding:
    """Of a bridge whose weights were folded or reshaped, by its own components."""
    norm = bridge.ln_final.original_component
    weight = bridge.W_U.detach().float().cpu().clone()
    norm_weight, centred = _probe(copy.deepcopy(norm).float().cpu(), weight.shape[0])
    return Unembedding(weight, norm_weight if getattr(norm, "weight", None) is not None else None, centred)


@dataclass
class _Tail:
    """What runs after the last block."""

    head: nn.Module
    calls: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)  # module, input, output
    start: Tensor = field(default_factory=lambda: torch.empty(0))  # output of the last block
    head_input: Tensor = field(default_factory=lambda: torch.empty(0))
    scale: float = 1.0  # logits over what the head gives


@torch.no_grad()
def _run(model: nn.Module) -> _Tail:
    found: Any = model
    tail = _Tail(found.get_output_embeddings())
    if tail.head is None:
        raise UserError(f"{type(model).__name__} has no unembedding, so there is no logit lens; give a causal LM")
    prefix, layers = blocks(model)
    head_output = torch.empty(0)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal head_output
        output = output[0] if isinstance(output, tuple | list) else output
        if module is layers[-1]:
            tail.start = output.cpu()  # what is compared may be on several devices
            tail.calls.clear()
        elif module is tail.head:
            tail.head_input, head_output = args[0].cpu(), output.cpu()
        elif args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].is_floating_point():
            tail.calls.append((module, args[0].cpu(), output.cpu()))

    outside = [module for path, module in modules(model) if not path.startswith(f"{prefix}.")]
    with contextlib.ExitStack() as stack:
        for module in [*outside, layers[-1]]:
            stack.enter_context(module.register_forward_hook(after))
        size = int(text_config(model).vocab_size)
        ids = torch.linspace(size // 4, size // 2, 4).long()[None]
        logits = model(input_ids=ids.to(device_of(model)), use_cache=False).logits.cpu()
    ratio = float((logits.double() * head_output.double()).sum() / head_output.double().square().sum())
    proportional = torch.allclose(logits.double(), head_output.double() * ratio, rtol=1e-2, atol=1e-4)
    tail.scale = ratio if proportional and abs(ratio - 1) > 1e-4 else 1.0  # a soft cap is not a multiplier
    return tail


def _matrix(model: nn.Module, module: nn.Module) -> Tensor:
    return weight_of(model, module).detach().float().cpu()


@torch.no_grad()
def _probe(norm: nn.Module, d_in: int) -> tuple[Tensor, bool]:
    """What a norm in float32 multiplies the normalised vector by, and whether it subtracts the mean first."""
    x = torch.ones(d_in)  # of mean 0 and root mean square 1, no entry 0
    x[1::2] = -1.0
    if d_in % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0]) * 0.5**0.5
    # The bias cancels in the difference.
    weight = (norm(x[None]) - norm(-x[None]))[0] / (2 * x)
    shifted = (norm(x[None] + 1) - norm(-x[None] - 1))[0] / 2
    centred = (shifted - weight * x).norm() < (shifted - weight * (x + 1) / 2**0.5).norm()
    return weight, bool(centred)
