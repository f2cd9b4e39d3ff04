"""Attribute the change of a steered token's logit to the latents and the error term.

At the hook point the activations move from ``x`` to ``x'``. In terms of the SAE, latents change their activation and
the error term changes: ``x' - x = sum_j (c'_j - c_j) d_j + (e' - e)``, exactly. The contribution of each part to a
logit is its share of the path integral of the gradient from ``x`` to ``x'`` (integrated gradients, Sundararajan et
al., 2017, arXiv 1703.01365), summed over all positions. The contributions add up to the change of the logit; the error
of the numerical integration is reported as ``gap``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.gradients import gradient_of
from saelab.lm.offload import device_of
from saelab.lm.sites import check_replaceable, locate, underlying
from saelab.lm.tokens import end_ids, token_text, tokenize, tokenizer_of
from saelab.lm.unwrapped import frozen
from saelab.runs import Run, as_run
from saelab.sae import SAE
from saelab.steering.attachment import attach
from saelab.steering.generation import forward, generate_tokens
from saelab.steering.interventions import Intervention, LatentIntervention


@dataclass(frozen=True)
class MovedLatent:
    """One latent's part in the change of a logit."""

    latent: int
    activation_change: float  # summed over positions
    contribution: float


@dataclass(frozen=True)
class TokenAttribution:
    """One generated token. Logits are relative to their mean over the vocabulary, which softmax does not see."""

    token: int
    text: str
    position: int  # among the generated tokens
    logit_before: float
    logit_after: float
    steered: float  # from the steered latents
    other_latents: float
    error_term: float  # and what bookkeeping latents of an SAE that reads normalised activations carry
    gap: float  # change - steered - other_latents - error_term
    earlier_positions: float  # the part of the change that reached the token through attention to earlier tokens
    top_latents: list[MovedLatent]  # the other latents that mattered most, by size of contribution

    @property
    def change(self) -> float:
        """Steered minus unsteered logit."""
        return self.logit_after - self.logit_before


def attribute_logits(
    model: nn.Module,
    prompt: str,
    interventions: Intervention | Sequence[Intervention],
    run: Run | SAE | Path | str,
    *,
    max_new_tokens: int = 8,
    latents: Sequence[int] | None = None,
    steps: int = 16,
    top: int = 5,
    tokenizer: Any = None,
) -> list[TokenAttribution]:
    """Generate greedily from ``prompt`` under ``interventions`` (at one hook point) and attribute every token's logit.

    ``run`` is the SAE of that hook point. ``latents`` are those that count as steered; by default the ones the
    interventions name, none for a direction that did not come from latents.
    """
    interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    hooks = {i.hook_name for i in interventions}
    if len(hooks) != 1:
        raise UserError(
            f"attribution takes interventions at one hook point, not at {', '.join(sorted(hooks)) or 'none'}"
        )
    hook_name = hooks.pop()
    source = as_run(run, hook_name)
    if source.sae.transcodes:
        raise UserError(
            "a steered token is split into latents of the SAE that lies there; a transcoder reads elsewhere"
        )
    steered = sorted(named_latents(interventions) if latents is None else map(source.check_latent, latents))
    tokenizer = tokenizer_of(model, tokenizer)
    ids, _ = tokenize(tokenizer, prompt)
    row = generate_tokens(
        model, ids, None, interventions, eos=end_ids(model, tokenizer), max_new_tokens=max_new_tokens
    )[0]
    text = torch.cat([ids, torch.tensor([row], dtype=torch.int64)], dim=1)
    path = _Path(model, hook_name, text, ids.shape[1], interventions)
    split = _Split(source.sae, path.x[0], path.steered_x[0], steered)
    gradients = path.mean_gradients(range(ids.shape[1] - 1, text.shape[1] - 1), steps)
    return [
        _attribute_token(tokenizer, path, split, gradient, i, ids.shape[1] - 1 + i, top)
        for i, gradient in enumerate(gradients)
    ]


def named_latents(interventions: Sequence[Intervention]) -> set[int]:
    """The latents that interventions act on, directly or through a vector made of them."""
    found: set[int] = set()
    for intervention in interventions:
        if isinstance(intervention, LatentIntervention):
            found.add(intervention.latent)
        found |= _latents_of([vector.origin for vector in intervention.directions])
    return found


def _latents_of(origin: Any) -> set[int]:
    if isinstance(origin, list):
        return set().union(*map(_latents_of, origin))
    if origin.get("kind") == "latent":
        return {int(origin["latent"])}
    if origin.get("kind") == "latents":
        return {int(latent) for latent in origin["weights"]}
    return _latents_of(origin["of"]) if "of" in origin else set()


class _Path:
    """The straight line from the unsteered to the steered activations at one hook point, and logits along it."""

    def __init__(
        self, model: nn.Module, hook_name: str, text: Tensor, prompt: int, interventions: Sequence[Intervention]
    ) -> None:
        self.model, self.root, self.site = model, underlying(model), check_replaceable(locate(model, hook_name))
        self.text = text.to(device_of(model))
        with attach(model, []):
            self.x, self.logits = self._read()
        with attach(model, interventions) as positions, positions.generating(prompt):
            self.steered_x, self.steered_logits = self._read()

    @torch.no_grad()
    def _read(self) -> tuple[Float[Tensor, "1 length d_in"], Float[Tensor, "length vocabulary"]]:
        seen: list[Tensor] = []
        with self.site.register(self.model, lambda x: seen.append(x.clone())):
            logits = forward(self.root, self.text, torch.ones_like(self.text))[0]
        return seen[0], _centred(logits[0])

    def mean_gradients(self, positions: Sequence[int], steps: int) -> Iterator[Float[Tensor, "length d_in"]]:
        """For the token after each position: the gradient of its logit, averaged along the path."""
        alphas = (torch.arange(steps, device=self.x.device) + 0.5) / steps
        line = self.x + alphas[:, None, None].to(self.x) * (self.steered_x - self.x)
        line.requires_grad_()
        texts = self.text.expand(steps, -1)
        with frozen(self.root), torch.enable_grad():
            with self.site.register(self.model, lambda x: line):
                logits = forward(self.root, texts, torch.ones_like(texts))[0]
            for position in positions:
                wanted = _centred(logits[:, position])[:, self.text[0, position + 1]].sum()
                yield gradient_of(wanted, line, retain_graph=True).mean(dim=0).float()


class _Split:
    """The move ``x' - x`` as steered latents, other latents and error term."""

    def __init__(self, sae: SAE, x: Tensor, steered_x: Tensor, steered: Sequence[int]) -> None:
        with torch.no_grad():
            before, after = sae.encode(x.to(sae.W_dec)), sae.encode(steered_x.to(sae.W_dec))
        self.W_dec = sae.W_dec.detach()
        self.move = (steered_x - x).to(self.W_dec)
        self.rows = torch.cat([after.rows(), before.rows()])
        self.indices = torch.cat([after.indices, before.indices])
        self.changes = torch.cat([after.values, -before.values]).detach()
        self.is_steered = torch.isin(torch.arange(sae.d_sae, device=sae.device), _index(steered, sae))
        self.d_sae, self.n_latents = sae.d_sae, sae.n_features

    def contributions(self, gradient: Float[Tensor, "length d_in"]) -> Float[Tensor, " d_sae"]:
        """Each latent's change of activation times the logit's slope along its direction, summed over positions."""
        slopes = (gradient.to(self.W_dec)[self.rows] * self.W_dec[self.indices]).sum(dim=1)
        found = self.sum_by_latent(self.changes * slopes)
        found[self.n_latents :] = 0.0
        return found

    def sum_by_latent(self, entries: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
        return entries.new_zeros(self.d_sae).index_add_(0, self.indices, entries)


def _attribute_token(
    tokenizer: Any, path: _Path, split: _Split, gradient: Tensor, i: int, position: int, top: int
) -> TokenAttribution:
    token = int(path.text[0, position + 1])
    before, after = float(path.logits[position, token]), float(path.steered_logits[position, token])
    by_position = (gradient.to(split.move) * split.move).sum(dim=1)
    by_latent = split.contributions(gradient)
    steered = float(by_latent[split.is_steered].sum())
    others = by_latent.masked_fill(split.is_steered, 0.0)
    error = float(by_position.sum() - by_latent.sum())
    changes = split.sum_by_latent(split.changes)
    best = others.abs().topk(min(top, split.d_sae)).indices.tolist()
    return TokenAttribution(
        token,
        token_text(tokenizer, token),
        i,
        before,
        after,
        steered,
        float(others.sum()),
        error,
        after - before - float(by_position.sum()),
        float(by_position.sum() - by_position[position]),
        [MovedLatent(j, float(changes[j]), float(others[j])) for j in best if others[j] != 0],
    )


def _centred(logits: Float[Tensor, "... vocabulary"]) -> Float[Tensor, "... vocabulary"]:
    return logits.float() - logits.float().mean(dim=-1, keepdim=True)


def _index(latents: Sequence[int], sae: SAE) -> Int[Tensor, " latents"]:
    return torch.tensor(list(latents), dtype=torch.int64, device=sae.device)
