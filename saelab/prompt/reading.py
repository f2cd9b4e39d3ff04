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

    ``first`` is the number of leading positions the SAE was not trained on (the first token's activation is an
    attention sink, BOS or not); they are shown, but no ranking counts them, unless the text has no other. ``front`` is
    the number of tokens that were put in front of the text: one where it got a BOS token.
    """

    strings: list[str]
    acts: Float[Tensor, "n d_in"]
    grads: Float[Tensor, "n d_in"] | None  # of the next-token loss, summed over the text
    code: SparseCode
    recon: Float[Tensor, "n d_out"]
    first: int = 0
    front: int = 0
    target: Float[Tensor, "n d_out"] | None = None  # of a transcoder: what it reconstructs
    cut: int = 0
    """Tokens at the end of the text that were left out."""

    @property
    def goal(self) -> Float[Tensor, "n d_out"]:
        """What the SAE reconstructs."""
        return self.acts if self.target is None else self.target

    def through(self, sae: SAE) -> Reading:
        """The same activations in another SAE of the same hook point, and of the same target where it is a transcoder.

        Raises UserError for another width, and for a transcoder beside an SAE that is none.
        """
        if sae.transcodes != (self.target is not None):
            raise UserError(
                "a transcoder and an SAE of the place itself reconstruct different activations; compare alike"
            )
        code, recon = _encode(sae, self.acts, self.grads)
        return replace(self, code=code, recon=recon)

    @property
    def n(self) -> int:
        return len(self.strings)

    def unexplained(self) -> list[float]:
        """Per token ``|goal - recon|^2 / |goal|^2``: the share of its squared norm that the SAE loses."""
        lost = (self.goal - self.recon).square().sum(1) / self.goal.square().sum(1).clamp_min(1e-30)
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

    def loss_without(self, latent: int, sae: SAE) -> list[float]:
        """At every position, how the summed next-token loss would change without this latent there, in nats.

        First order: minus the activation times the gradient along the latent's direction. Needs gradients (UserError).
        """
        if self.grads is None:
            raise UserError("the text was read without gradients; give gradients=True and a text of two tokens or more")
        slope = self.grads @ sae.W_dec[latent].detach().to(self.grads)
        return (-torch.tensor(self.trace(latent)).to(slope) * slope).tolist()

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
    skip_first: int | None = None,
    gradients: bool = False,
    max_tokens: int = MAX_TOKENS,
    hook_name_out: str = "",
) -> Reading:
    """Run ``text`` through ``model`` up to ``hook_name`` and encode every position with ``sae`` (raw units).

    ``model`` is what :func:`saelab.lm.load_model` gives. ``bos`` puts the tokenizer's BOS token in front, as in the
    SAE's training data; ``skip_first`` positions at the start, by default the one of BOS, were not in that data
    (:func:`saelab.runs.language_model.untrained_start`). ``gradients`` also computes the gradient of the next-token
    loss; the code changes only where the SAE selects by gradients at inference. A transcoder also needs
    ``hook_name_out``, the place of its target; gradients are those there. What is longer than ``max_tokens``, or than
    the texts that the model was made for, is left out and counted in ``cut``. Raises UserError for an empty text, a
    hook point the model lacks, and a width that does not fit.
    """
    from saelab.harvesting.activations import Reader
    from saelab.lm.limits import position_limit
    from saelab.lm.sites import locate

    if not (own := token_ids(model.tokenizer, text, bos=False)):
        raise UserError("the text is empty; type at least one word")
    every = token_ids(model.tokenizer, text, bos)
    limit, _ = position_limit(model)
    ids = every[: min(max_tokens, limit or max_tokens)]
    if sae.transcodes and not hook_name_out:
        raise UserError(f"the SAE at {hook_name} is a transcoder; give hook_name_out, the place that it reconstructs")
    names = [hook_name, hook_name_out] if sae.transcodes else [hook_name]
    reader = Reader(model, [locate(model, name) for name in names])
    if (gradients or sae.selects_by_gradient) and len(ids) > 1:
        acts, slopes = reader.gradients(torch.tensor([ids]))
        grads = slopes[-1][0].float().to(sae.device)
    else:
        acts, grads = reader.activations(torch.tensor([ids])), None
    x, goal = (part[0].float().to(sae.device) for part in (acts[0], acts[-1]))
    code, recon = _encode(sae, x, grads)
    target, cut = goal if sae.transcodes else None, len(every) - len(ids)
    first = min(int(bos) if skip_first is None else skip_first, len(ids) - 1)
    front = len(every) - len(own)  # none where the tokenizer has no BOS token, or the text begins with it
    return Reading(decode_each(model.tokenizer, ids), x, grads, code, recon, first, front, target, cut)


@torch.no_grad()
def _encode(sae: SAE, x: Tensor, grads: Tensor | None) -> tuple[SparseCode, Tensor]:
    if x.shape[1] != sae.d_in:
        raise UserError(
            f"the activations have width {x.shape[1]}, the SAE reads d_in={sae.d_in}; load the model it belongs to"
        )
    own = x.to(sae.device)
    code = sae.encode(own, None if grads is None else grads.to(sae.device))
    return sae.features(code), sae.reconstruct(own, code).to(x.device)
