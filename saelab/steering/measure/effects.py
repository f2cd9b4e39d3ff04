"""Effects of an intervention on a model's predictions: on a concept's tokens, on all predictions, on repetition.

All numbers compare the steered with the unsteered model on the same tokens (teacher forcing). They are given per
prompt, so that an interval over prompts can be computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.devices import in_float64
from saelab.errors import UserError
from saelab.lm.offload import device_of
from saelab.lm.padding import masks_padding
from saelab.lm.sites import underlying
from saelab.lm.tokens import Prompts, token_ids, tokenize, tokenizer_of
from saelab.steering.attachment import attach
from saelab.steering.generation import forward
from saelab.steering.interventions import Intervention
from saelab.steering.rows import on_rows


@dataclass(frozen=True, eq=False)
class Effects:
    """Per prompt, over its tokens."""

    kl: Float[Tensor, " prompts"]  # mean KL(unsteered || steered) of the next-token distribution, nats
    cross_entropy: Float[Tensor, " prompts"]  # steered, of the text's own next tokens, mean, nats; NaN without one
    cross_entropy_before: Float[Tensor, " prompts"]
    mass: Float[Tensor, " prompts"]  # steered probability of a concept token next, mean
    mass_before: Float[Tensor, " prompts"]
    logit_shift: Float[Tensor, " prompts"]  # mean logit of the concept tokens minus that of all, steered - unsteered

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity under the steered model, divided by that under the unsteered one: the geometric mean over prompts.

        ``exp(mean over prompts of (cross_entropy - cross_entropy_before))``, every prompt with the same weight whatever
        its length, as in ``mean_kl``; without prompts of one token. UserError where there are no others.
        """
        ratio = float((self.cross_entropy - self.cross_entropy_before).double().nanmean())
        if math.isnan(ratio) and bool(self.cross_entropy_before.isnan().all()):
            raise UserError("a prompt of one token has no perplexity; give longer prompts, or a budget of KL")
        return math.exp(ratio)


class UnsteeredBaseline:
    """The unsteered model's predictions on a set of prompts, computed once, to measure interventions against.

    ``concept`` lists words or token ids whose probability and logits are measured too (see :func:`concept_tokens`).
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        concept: Sequence[str] | Sequence[int] = (),
        *,
        tokenizer: Any = None,
        batch_size: int = 8,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer_of(model, tokenizer)
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.concept = concept_tokens(self.tokenizer, concept)
        device, batch_size = device_of(model), batch_size if masks_padding(model) else 1
        self._batches = [
            tuple(t.to(device) for t in tokenize(self.tokenizer, self.prompts[i : i + batch_size]))
            for i in range(0, len(self.prompts), batch_size)
        ]
        self._before = [self._logits(ids, mask, ()) for ids, mask in self._batches]

    def measure(self, interventions: Intervention | Sequence[Intervention]) -> Effects:
        """The effects of ``interventions``, one row per prompt."""
        parts = [
            self._compare(ids, mask, before, self._logits(ids, mask, interventions))
            for (ids, mask), before in zip(self._batches, self._before)
        ]
        return Effects(*(torch.cat(column) for column in zip(*parts)))

    def measure_many(self, steered: Sequence[Sequence[Intervention]], rows: int = 32) -> list[Effects]:
        """The effects of several sets of interventions, as many at a time as ``rows`` texts of a batch allow."""
        parts: list[list[tuple[Tensor, ...]]] = [[] for _ in steered]
        for (ids, mask), before in zip(self._batches, self._before):
            n, step = len(ids), max(rows // len(ids), 1)
            for start in range(0, len(steered), step):
                some = steered[start : start + step]
                own = [i for k, group in enumerate(some) for i in on_rows(group, range(k * n, (k + 1) * n))]
                logits = self._logits(ids.repeat(len(some), 1), mask.repeat(len(some), 1), own)
                for k, after in enumerate(logits.split(n)):
                    parts[start + k].append(self._compare(ids, mask, before, after))
        return [Effects(*(torch.cat(column) for column in zip(*part))) for part in parts]

    @torch.no_grad()
    def _logits(self, ids: Tensor, mask: Tensor, interventions: Intervention | Sequence[Intervention]) -> Tensor:
        with attach(self.model, interventions):
            return forward(underlying(self.model), ids, mask)[0]

    @torch.no_grad()
    def _compare(self, ids: Tensor, mask: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, ...]:
        real = mask.bool()
        log_p, log_q = before.float().log_softmax(-1), after.float().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
        # A token has a known successor where both are real; with padding on the left that is all but the last.
        known = real[:, :-1]
        ce_after, ce_before = (
            _row_mean(-q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], known) for q in (log_q, log_p)
        )
        columns = [_row_mean(kl, real), ce_after, ce_before]
        tokens = self.concept.to(ids.device)
        if not tokens.numel():
            nothing = torch.zeros_like(columns[0])
            return (*columns, nothing, nothing, nothing)
        mass_after, mass_before = (_row_mean(q[..., tokens].exp().sum(-1), real) for q in (log_q, log_p))
        shift = (after - before).float()
        relative = shift[..., tokens].mean(-1) - shift.mean(-1)
        return (*columns, mass_after, mass_before, _row_mean(relative, real))


def concept_tokens(tokenizer: Any, concept: Sequence[str] | Sequence[int]) -> Int[Tensor, " tokens"]:
    """Token ids of a concept: ids as they are, words as the first token of each with and without a leading space."""
    if isinstance(concept, str):
        raise UserError(f"concept is a list of words or token ids, not the string {concept!r}")
    found: list[int] = []
    for item in concept:
        if isinstance(item, str):
            pieces = [token_ids(tokenizer, text, bos=False) for text in (item, f" {item}")]
            found += [row[0] for row in pieces if row]
        else:
            found.append(int(item))
    return torch.tensor(sorted(set(found)), dtype=torch.int64)


def repetition(tokens: Sequence[int], n: int = 3) -> float:
    """Share of a text's ``n``-grams that occurred in it before: 0 for none, near 1 for a loop."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _row_mean(values: Float[Tensor, "batch length"], chosen: Tensor) -> Float[Tensor, " batch"]:
    total = in_float64(torch.where(chosen, values, torch.zeros_like(values))).sum(dim=1)
    return (total / chosen.sum(dim=1).to(total.device)).float().cpu()
