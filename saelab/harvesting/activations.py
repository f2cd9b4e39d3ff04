"""Run a model up to its hook points, as fast as the plain Hugging Face model, and read the activations.

TransformerBridge forces eager attention and fires a hook point around every module, which costs up to a quarter of
the time and is not needed to read a few points. So the same weights are put into a plain Hugging Face model with
its fastest attention. Before use it is compared with the bridge on real text: a bridge whose weights were folded, on
which hooks are set, or whose point is not a module's input or output is read through the bridge itself.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.errors import UserError, first_line
from saelab.lm.fingerprint import relative_gap, same_activations
from saelab.lm.gradients import gradients_of
from saelab.lm.hook_names import layer_of
from saelab.lm.limits import check_length, check_tokens
from saelab.lm.offload import device_of
from saelab.lm.sites import Edit, Site, locate, replaceable
from saelab.lm.structure import Reached, opened, underlying
from saelab.lm.unwrapped import frozen, has_hooks, plain_model

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_log = logging.getLogger(__name__)


class Reader:
    """Activations, and on request gradients, of a model at some hook points.

    ``model`` is a bridge, or a plain Hugging Face model where TransformerLens reads none.
    """

    def __init__(self, model: TransformerBridge | nn.Module, sites: Sequence[Site]) -> None:
        model = opened(model)
        self.model: Any = model
        self.sites = list(sites)
        self.device = device_of(model)
        self.plain: nn.Module | None = model if underlying(model) is model else None
        self.checked_length = False

    def widths(self, tokens: Int[Tensor, "n_ctx ctx"]) -> list[int]:
        """``d_in`` at each hook point; UserError where it holds no vector per token."""
        found = self.activations(tokens)
        # A second length, because a number of heads may be that of the tokens.
        cut = tokens[:, : max(tokens.shape[1] // 2, 1)]
        inner = any(site.side == "inner" for site in self.sites)
        for site, x, shorter in zip(self.sites, found, self.activations(cut) if inner else found):
            if x.shape[:2] != tokens.shape or (inner and shorter.shape[:2] != cut.shape):
                raise UserError(
                    f"{site.hook_name} holds {tuple(x.shape)}, not one vector per token; choose another hook point"
                )
        return [x.shape[-1] for x in found]

    def use_plain_model(self, tokens: Int[Tensor, "n_ctx ctx"], skip_first: int = 0) -> bool:
        """Switch to the plain model if it gives the same activations as the bridge on ``tokens``, at every position but
        the first ``skip_first``."""
        if self.plain is not None:
            return True
        if any(site.side == "inner" for site in self.sites):
            return False
        if has_hooks(self.model):
            _log.info("reading through the bridge: hooks are set on it")
            return False
        plain = plain_model(self.model)
        if plain is None:
            _log.info("reading through the bridge: the model has no plain form with its weights")
            return False
        bridged = self._bridged(tokens)
        self.plain = plain
        fast = self.activations(tokens)
        for site, a, b in zip(self.sites, fast, bridged or fast):
            a, b = a[:, skip_first:], b[:, skip_first:]
            if not same_activations(a, b, (layer_of(site.hook_name) or 0) + 1):
                gap = relative_gap(a, b)
                _log.warning("reading through the bridge: the plain model differs by %.2g at %s", gap, site.hook_name)
                self.plain = None
                return False
        return True

    def _bridged(self, tokens: Tensor) -> list[Tensor] | None:
        """What the bridge reads; None, with a message, where TransformerLens cannot run the model."""
        try:
            return self.activations(tokens)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever its components stumble over
            _log.warning(
                "reading the plain Hugging Face model: TransformerLens cannot run this one (%s)", first_line(error)
            )
            return None

    @torch.no_grad()
    def activations(self, tokens: Int[Tensor, "n_ctx ctx"]) -> list[Float[Tensor, "n_ctx ctx d_in"]]:
        """One tensor per hook point; the model runs no further than the last of them."""
        found: dict[int, Tensor] = {}

        def keep(index: int) -> Edit:
            def hook(x: Tensor) -> None:
                # Later modules may write into x in place, but only if the model runs that far.
                found[index] = x if len(found) + 1 == len(self.sites) else x.clone()
                if len(found) == len(self.sites):
                    raise Reached

            return hook

        with contextlib.suppress(Reached):
            self._run(tokens, [keep(i) for i in range(len(self.sites))])
        return self._in_order(found)

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

        def follow(index: int, partial: bool) -> Edit:
            def hook(x: Tensor) -> Tensor | None:
                found[index] = x if x.requires_grad else x.detach().requires_grad_()
                # What bypasses the module is part of the gradient too, and a replacement would cut it off. Elsewhere
                # the model goes on with a clone, because later modules may write into it (Falcon).
                return None if partial else found[index].clone()

            return hook

        partial = [not replaceable(site) for site in self.sites]
        with frozen(underlying(self.model)), contextlib.ExitStack() as stack:
            for site in itertools.compress(self.sites, partial):
                stack.enter_context(self._follow_block(site))
            logits = self._run(tokens, [follow(i, partial[i]) for i in range(len(self.sites))])
            targets = tokens[:, 1:].reshape(-1).to(logits.device)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
            points = self._in_order(found)
            grads = gradients_of([loss], points)
        for site, grad in zip(self.sites, grads):
            if grad is None:
                raise UserError(f"no gradient reaches {site.hook_name} in this model; choose a residual stream")
        return [x.detach() for x in points], [g for g in grads if g is not None]

    def _follow_block(self, site: Site) -> contextlib.AbstractContextManager[Any]:
        """Differentiate from the input of the site's block on."""
        start = locate(self.model, f"blocks.{layer_of(site.hook_name)}.hook_resid_pre")
        return start.register(self._runs, lambda x: x if x.requires_grad else x.detach().requires_grad_())

    def _in_order(self, found: dict[int, Tensor]) -> list[Tensor]:
        missing = [site.hook_name for i, site in enumerate(self.sites) if i not in found]
        if missing:
            raise UserError(f"{', '.join(missing)} is no part of a pass of this model; choose another hook point")
        return [_flat(found[i]) for i in range(len(self.sites))]

    @property
    def _runs(self) -> nn.Module:
        return self.model if self.plain is None else self.plain

    def _run(self, tokens: Int[Tensor, "n_ctx ctx"], hooks: Sequence[Edit]) -> Float[Tensor, "n_ctx ctx d_vocab"]:
        """Logits of a forward pass with ``hooks[i]`` at ``sites[i]``; a hook may return a replacement."""
        check_tokens(self.model, tokens, getattr(self.model, "tokenizer", None))
        if not self.checked_length:
            check_length(self.model, tokens.shape[1], "a context")
            self.checked_length = True  # once, because a warning per pass would drown the rest
        tokens = tokens.pin_memory() if self.device.type == "cuda" else tokens  # a copy that waits for no pass
        tokens = tokens.to(self.device, non_blocking=True)
        with contextlib.ExitStack() as stack:
            for site, hook in zip(self.sites, hooks):
                stack.enter_context(site.register(self._runs, hook))
            if self.plain is None:
                return self.model(tokens, return_type="logits")
            return self.plain(input_ids=tokens, use_cache=False).logits


def _flat(x: Tensor) -> Tensor:
    """``[n_ctx, ctx, d_in]``: heads, where there are any, side by side."""
    return rearrange(x, "context position ... -> context position (...)")
