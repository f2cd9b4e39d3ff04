"""The model made linear: attention patterns and the scales of norms held at their values, MLPs cut out.

What is left between places is linear, so that the effects of latents, error terms, embeddings, MLPs without a
transcoder and biases add up to the logit. Queries and keys are cut from the graph, which leaves the derivative of a
model whose patterns do not move. A norm is replaced by its linear map at the present scale: how it scales is found by
probing the module, and a module that does anything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.norms import NormParts, norm_parts
from saelab.lm.sites import locate, underlying
from saelab.lm.structure import attention, blocks, children, mlp, modules, state_space, text_config

Leaf = Callable[[int, Tensor], Tensor]
_ACTIVATIONS = {"act_fn", "activation_fn", "act", "activation"}
LOOSEST = 0.05  # of what a norm gives, the part that rounding may change; in bfloat16 it is below 0.01
_OF_PATTERN = re.compile("(q|k|query|key)_")  # names of norms of queries and keys


@dataclass
class Frozen:
    """Holds patterns and scales while a pass runs, and collects the constants that the pass adds."""

    biases: list[Tensor] = field(default_factory=list)
    _parts: dict[nn.Module, NormParts] = field(default_factory=dict)

    @contextmanager
    def apply(self, model: nn.Module, covered: set[tuple[Any, ...]], leaf: Leaf) -> Iterator[None]:
        """Freeze ``model``. MLPs whose output is not at one of the places ``covered`` become inputs (``leaf``).

        UserError, with the reason, for a block whose attention or MLP cannot be told apart.
        """
        with ExitStack() as stack:
            # First the norms: what an MLP adds may be the output of one.
            norms = self._norms(stack, model)
            for index, block in enumerate(blocks(model)[1]):
                self._attention(stack, model, index, block)
                self._mlp(stack, model, index, block, covered, leaf)
            for name, parameter in underlying(model).named_parameters():
                owner = name.rpartition(".")[0]
                if name.endswith("bias") and owner not in norms:
                    self.biases.append(parameter.requires_grad_())
                    stack.callback(parameter.requires_grad_, False)
            yield

    def _attention(self, stack: ExitStack, model: nn.Module, index: int, block: nn.Module) -> None:
        if attention(block) is None or state_space(block) is not None:
            raise UserError(
                f"block {index} of {type(underlying(model)).__name__} has a layer that is no attention, so it has no "
                "pattern to freeze; use --mode gradient"
            )
        for point in ("attn.hook_q", "attn.hook_k"):
            try:
                site = locate(model, f"blocks.{index}.{point}")
            except UserError as error:
                raise UserError(f"attention cannot be frozen ({error}); use --mode gradient") from error
            if site.side == "inner":
                raise UserError(f"attention cannot be frozen: {site.hook_name} is inside a module; use --mode gradient")
            stack.enter_context(site.register(model, Tensor.detach))

    def _mlp(
        self,
        stack: ExitStack,
        model: nn.Module,
        index: int,
        block: nn.Module,
        covered: set[tuple[Any, ...]],
        leaf: Leaf,
    ) -> None:
        inside = mlp(block)
        if inside is None:
            return
        if inside and (found := _ACTIVATIONS & set(children(block))):
            raise UserError(
                f"block {index} of {type(underlying(model)).__name__} has a nonlinearity beside its MLP "
                f"({', '.join(sorted(found))}); use --mode gradient"
            )
        names = [f"blocks.{index}.hook_mlp_out", f"blocks.{index}.mlp.hook_out"]
        try:
            sites = [locate(model, name) for name in names]
        except UserError as error:
            raise UserError(f"the MLP cannot be cut out ({error}); use --mode gradient") from error
        if not any(site.place in covered for site in sites):
            stack.enter_context(sites[0].register(model, lambda x: leaf(index, x)))

    def _norms(self, stack: ExitStack, model: nn.Module) -> set[str]:
        found = set()
        for path, module in modules(model):
            if "norm" not in type(module).__name__.lower() or next(module.children(), None) is not None:
                continue
            found.add(path)
            if _OF_PATTERN.match(path.rpartition(".")[2]):
                # Queries and keys are cut already, but of a fused map they share a tensor with the values.
                stack.enter_context(module.register_forward_hook(lambda _m, _a, output: output.detach()))
            else:
                stack.enter_context(module.register_forward_hook(self._held(path), with_kwargs=True))
        return found

    def _held(self, path: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(output, Tensor) or not isinstance(x, Tensor) or not x.requires_grad:
                return None
            with torch.no_grad():
                parts = self._parts.get(module) or self._parts.setdefault(module, norm_parts(module, x))
                base = self._base(parts, x)
                change = output.to(base) - parts.bias
                scale = (change * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True).clamp_min(1e-30)
                gap = (scale * base - change).norm() / change.norm().clamp_min(1e-30)
            # Norms compute in float32 at most places, whatever the model's precision. A gap is never above 1.
            eps = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
            if not float(gap) <= min(64 * eps**0.75, LOOSEST):
                raise UserError(f"{path} ({type(module).__name__}) is no norm that can be frozen; use --mode gradient")
            bias = parts.bias.to(x).clone().requires_grad_()
            self.biases.append(bias)
            return (scale * self._base(parts, x)).to(output.dtype) + bias.to(output.dtype)

        return hook

    @staticmethod
    def _base(parts: NormParts, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return parts.weight.to(wide) * (wide - wide.mean(-1, keepdim=True) if parts.centred else wide)


def caps(model: nn.Module) -> bool:
    """Whether a model caps its logits by a tanh (Gemma 2), which is not linear."""
    return bool(getattr(text_config(model), "final_logit_softcapping", None))


@contextmanager
def before_cap(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the unembedding's output of a model that caps its logits; nothing of any other."""
    seen: list[Tensor] = []
    if not caps(model):
        yield seen
        return
    found: Any = underlying(model)
    handle = found.get_output_embeddings().register_forward_hook(lambda _m, _a, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
