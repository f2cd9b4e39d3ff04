"""Run a model up to its hook points, as fast as the plain Hugging Face model, and read the activations.

TransformerBridge forces eager attention and fires a hook point around every module, which costs up to a quarter of
the time and is not needed to read a few points. So the same weights are put into a plain Hugging Face model with
its fastest attention. Before use it is compared with the bridge on real text: a bridge whose weights were folded,
whose hooks were edited, or whose point is not a module's input or output is read through the bridge itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.fingerprint import relative_gap, same_activations
from saelab.lm.hook_names import layer_of
from saelab.lm.sites import Edit, Site, device_of
from saelab.lm.unwrapped import frozen, plain_model

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_log = logging.getLogger(__name__)


class _Stop(Exception):
    """Raised when all hooks have fired, because the rest of the model is not needed."""


class Reader:
    """Activations, and on request gradients, of a model at some hook points."""

    def __init__(self, model: TransformerBridge, sites: Sequence[Site]) -> None:
        self.model, self.sites = model, list(sites)
        self.device = device_of(model)
        self.plain: nn.Module | None = None

    def widths(self, tokens: Int[Tensor, "n_ctx ctx"]) -> list[int]:
        """``d_in`` at each hook point; UserError where it holds no vector per token."""
        found = self.activations(tokens)
        for site, x in zip(self.sites, found):
            if x.shape[:2] != tokens.shape:
                raise UserError(
                    f"{site.hook_name} holds {tuple(x.shape)}, not one vector per token; choose another hook point"
                )
        return [x.shape[-1] for x in found]

    def use_plain_model(self, tokens: Int[Tensor, "n_ctx ctx"]) -> bool:
        """Switch to the plain model if it gives the same activations as the bridge on ``tokens``."""
        if any(site.side == "inner" for site in self.sites):
            return False
        plain = plain_model(self.model)
        if plain is None:
            _log.info("reading through the bridge: %s has no plain model", self.model.cfg.model_name)
            return False
        self.plain = plain
        fast = self.activations(tokens)
        self.plain = None
        for site, a, b in zip(self.sites, fast, self.activations(tokens)):
            if not same_activations(a, b, (layer_of(site.hook_name) or 0) + 1):
                gap = relative_gap(a, b)
                _log.warning("reading through the bridge: the plain model differs by %.2g at %s", gap, site.hook_name)
                return False
        self.plain = plain
        return True

    @torch.no_grad()
    def activations(self, tokens: Int[Tensor, "n_ctx ctx"]) -> list[Float[Tensor, "n_ctx ctx d_in"]]:
        """One tensor per hook point; the model runs no further than the last of them."""
        found: dict[int, Tensor] = {}

        def keep(index: int) -> Edit:
            def hook(x: Tensor) -> None:
                # Later modules may write into x in place, but only if the model runs that far.
                found[index] = x if len(found) + 1 == len(self.sites) else x.clone()
                if len(found) == len(self.sites):
                    raise _Stop

            return hook

        with contextlib.suppress(_Stop):
            self._run(tokens, [keep(i) for i in range(len(self.sites))])
        return [_flat(found[i]) for i in range(len(self.sites))]

    def both(self, tokens: Int[Tensor, "n_ctx ctx"], gradients: bool) -> tuple[list[Tensor], list[Tensor | None]]:
        """Activations, and gradients or Nones, at each hook point."""
        if not gradients:
            return self.activations(tokens), [None] * len(self.sites)
        acts, grads = self.gradients(tokens)
        return acts, list(grads)

    @torch.enable_grad()
    def gradients(
        self, tokens: Int[Tensor, "n_ctx ctx"]
    ) -> tuple[list[Float[Tensor, "n_ctx ctx d_in"]], list[Float[Tensor, "n_ctx ctx d_in"]]]:
        """Activations, and gradients of the next-token loss summed over all positions, at each hook point.

        The summed loss does not depend on how many tokens share a pass. Nothing before the first hook point is
        differentiated, and parameters receive no gradient.
        """
        found: dict[int, Tensor] = {}

        def follow(index: int) -> Edit:
            def hook(x: Tensor) -> Tensor:
                found[index] = x if x.requires_grad else x.detach().requires_grad_()
                return found[index]

            return hook

        with frozen(self.model.original_model):
            logits = self._run(tokens, [follow(i) for i in range(len(self.sites))])
            targets = tokens[:, 1:].reshape(-1).to(logits.device)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
            points = [found[i] for i in range(len(self.sites))]
            grads = torch.autograd.grad(loss, points)
        return [_flat(x.detach()) for x in points], [_flat(g) for g in grads]

    def _run(self, tokens: Int[Tensor, "n_ctx ctx"], hooks: Sequence[Edit]) -> Float[Tensor, "n_ctx ctx d_vocab"]:
        """Logits of a forward pass with ``hooks[i]`` at ``sites[i]``; a hook may return a replacement."""
        tokens = tokens.to(self.device)
        if self.plain is None:
            pairs: Any = [(site.canonical, _bridge_hook(hook)) for site, hook in zip(self.sites, hooks)]
            return self.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=pairs)
        with contextlib.ExitStack() as stack:
            for site, hook in zip(self.sites, hooks):
                stack.enter_context(site.register(self.plain, hook))
            return self.plain(input_ids=tokens, use_cache=False).logits


def _bridge_hook(read: Edit) -> Callable[..., Any]:
    # TransformerLens passes the hook point under the name ``hook``.
    return lambda x, hook: read(x)


def _flat(x: Tensor) -> Tensor:
    """``[n_ctx, ctx, d_in]``: heads, where there are any, side by side."""
    return rearrange(x, "context position ... -> context position (...)")
