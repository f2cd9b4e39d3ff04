"""A text inside the model: its tokens, the activations at the SAE's hook point, and the SAE's code for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import UserError
from saelab.lm.tokens import decode_each, token_ids
from saelab.sae import SAE
from saelab.sparse import SparseCode

MAX_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Reading:
    """The tokens, activations and codes of one text.

    ``first`` is the number of leading positions the SAE was not trained on (the BOS token's activation is an
    attention sink); they are shown, but no ranking counts them.
    """

    strings: list[str]
    acts: Float[Tensor, "n d_in"]
    grads: Float[Tensor, "n d_in"] | None  # of the next-token loss, summed over the text
    code: SparseCode
    recon: Float[Tensor, "n d_in"]
    first: int = 0
    cut: int = 0
    """Tokens at the end of the text that were left out."""

    def through(self, sae: SAE) -> Reading:
        """The same activations in another SAE of the same hook point. Raises UserError for another width."""
        code, recon = _encode(sae, self.acts, self.grads)
        return replace(self, code=code, recon=recon)

    @property
    def n(self) -> int:
        return len(self.strings)

    def unexplained(self) -> list[float]:
        """Per token ``|x - recon|^2 / |x|^2``: the share of its squared norm that the SAE loses."""
        lost = (self.acts - self.recon).square().sum(1) / self.acts.square().sum(1).clamp_min(1e-30)
        return lost.tolist()

    def l0(self) -> list[int]:
        return self.code.l0().tolist()

    def active(self, position: int) -> list[tuple[int, float]]:
        """(latent, activation) at one position, strongest first."""
        row = self.code[position : position + 1].nonzero()
        pairs = zip(row.indices.tolist(), row.values.tolist())
        return sorted(pairs, key=lambda pair: -abs(pair[1]))

    def trace(self, latent: int) -> list[float]:
        """A latent's activation at every position."""
        values = self.acts.new_zeros(self.n)
        hit = self.code.indices == latent
        values[self.code.rows()[hit]] = self.code.values[hit]
        return values.tolist()

    def strongest(self, count: int) -> list[tuple[int, float]]:
        """(latent, activation of largest magnitude) over the text without its first positions."""
        counted = self.code[self.first : self.n].nonzero()
        order = counted.values.abs().argsort(descending=True)
        best: dict[int, float] = {}
        for latent, value in zip(counted.indices[order].tolist(), counted.values[order].tolist()):
            if len(best) == count:
                break
            best.setdefault(latent, value)
        return list(best.items())


def read_prompt(
    model: Any,
    sae: SAE,
    text: str,
    hook_name: str,
    *,
    bos: bool = True,
    gradients: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> Reading:
    """Run ``text`` through ``model`` up to ``hook_name`` and encode every position with ``sae`` (raw units).

    ``model`` is what :func:`saelab.lm.load_model` gives. ``bos`` puts the tokenizer's BOS token in front, as in the
    SAE's training data. ``gradients`` also computes the gradient of the next-token loss; the code changes only where
    the SAE selects by gradients at inference. What is longer than ``max_tokens``, or than the texts that the model was
    made for, is left out and counted in ``cut``. Raises UserError for an empty text, a hook point the model lacks, and
    a width that does not fit.
    """
    from saelab.harvesting.activations import Reader
    from saelab.lm.limits import position_limit
    from saelab.lm.sites import locate

    if not token_ids(model.tokenizer, text, bos=False):
        raise UserError("the text is empty; type at least one word")
    every = token_ids(model.tokenizer, text, bos)
    limit, _ = position_limit(model)
    ids = every[: min(max_tokens, limit or max_tokens)]
    reader = Reader(model, [locate(model, hook_name)])
    if (gradients or sae.selects_by_gradient) and len(ids) > 1:
        (acts,), (grads,) = reader.gradients(torch.tensor([ids]))
        grads = grads[0].float()
    else:
        (acts,), grads = reader.activations(torch.tensor([ids])), None
    x, grads = acts[0].float().to(sae.device), None if grads is None else grads.to(sae.device)
    code, recon = _encode(sae, x, grads)
    first, cut = int(bos and len(ids) > 1), len(every) - len(ids)
    return Reading(decode_each(model.tokenizer, ids), x, grads, code, recon, first, cut)


@torch.no_grad()
def _encode(sae: SAE, x: Tensor, grads: Tensor | None) -> tuple[SparseCode, Tensor]:
    if x.shape[1] != sae.d_in:
        raise UserError(
            f"the activations have width {x.shape[1]}, the SAE reads d_in={sae.d_in}; load the model it belongs to"
        )
    code = sae.encode(x.to(sae.device), None if grads is None else grads.to(sae.device))
    return code, sae.decode(code).to(x.device)
