"""Edit single latents: encode the activations, change the code, and add the difference back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import UserError
from saelab.sae import SAE
from saelab.sparse import SparseCode
from saelab.steering.conditions import Condition, Gate
from saelab.steering.interventions import Intervention, LatentIntervention
from saelab.steering.positions import TokenContext
from saelab.steering.rows import OnRows

# Tokens that two interventions never share.
_APART = [{"prompt", "generated"}, {"instruction", "answer"}, {"instruction", "generated"}]
Gates = Mapping[Condition, Gate]


def selected(intervention: Intervention, context: TokenContext, gates: Gates) -> Tensor | bool:
    """The tokens that an intervention changes: a mask ``[batch, length]``, or True or False for all of them."""
    mask = context.select(intervention.where, intervention.skip_first)
    if mask is not False and intervention.when is not None:
        mask = gates[intervention.when].mask(context, intervention.hook_name) & mask
    if mask is not False and intervention.schedule is not None:
        on = intervention.schedule.weights(context) != 0
        mask = False if not bool(on.any()) else mask if bool(on.all()) else (on & mask).expand(context.batch, -1)
    return mask


class LatentEdits:
    """Edits of one SAE's code at one hook point, made together on one encoding."""

    def __init__(self, interventions: Sequence[LatentIntervention], gates: Gates) -> None:
        self.interventions, self.gates = list(interventions), gates
        first = self.interventions[0]
        self.sae: SAE = first.sae
        self.source = first.run.hook_name if self.sae.transcodes else ""  # where it reads, if not where it writes
        self.read: Callable[[], Tensor] | None = None  # gives the activations there
        self.keep_error = first.keep_error
        self.latents = sorted({i.latent for i in self.interventions})
        self.column = {latent: column for column, latent in enumerate(self.latents)}
        self._slot = torch.full((self.sae.d_sae,), -1, dtype=torch.int64, device=self.sae.device)
        self._slot[self.latents] = torch.arange(len(self.latents), device=self.sae.device)

    def activations(self, code: SparseCode) -> Float[Tensor, "n latents"]:
        """The edited latents' activations in a code, zero where they do not fire."""
        slot = self._slot[code.indices]
        hit = slot >= 0
        values = code.values.new_zeros(code.n, len(self.latents))
        values[code.rows()[hit], slot[hit]] = code.values[hit]
        return values

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "batch length d_out"], context: TokenContext) -> Tensor | None:
        """The edited activations, or None when nothing is selected in this pass."""
        masks = [selected(i, context, self.gates) for i in self.interventions]
        if all(mask is False for mask in masks):
            return None
        # The blocks of a model may be on several devices; the masks are where its tokens are.
        full = [torch.full(x.shape[:2], m, device=x.device) if isinstance(m, bool) else m.to(x.device) for m in masks]
        chosen = torch.stack(full).any(dim=0)
        rows = x[chosen].to(self.sae.W_dec)
        if rows.shape[0] == 0:
            return None
        source = rows if self.read is None else self.read().to(x.device)[chosen].to(self.sae.W_dec)
        code = self.sae.encode(source)
        before = self.activations(code)
        after = before.clone()
        for intervention, mask in zip(self.interventions, full):
            column = self.column[intervention.latent]
            values = after[:, column]
            new = intervention.edit(values)
            if intervention.schedule is not None:
                weights = intervention.schedule.weights(context).expand(x.shape[:2])[chosen.to(context.device)]
                new = values + weights.to(values) * (new - values)
            after[:, column] = torch.where(mask[chosen].to(rows.device), new, values)
        change = after - before
        base = rows if self.keep_error else self.sae.reconstruct(source, code)
        new = base + change @ self.sae.W_dec[self.latents]
        if self.keep_error:  # a token whose code did not change keeps its activations bit for bit
            new = torch.where((change != 0).any(dim=1, keepdim=True), new, base)
        new = new.to(x)
        if not bool(new.isfinite().all()):
            latents, dtype = ", ".join(map(str, self.latents)), str(x.dtype).removeprefix("torch.")
            raise UserError(
                f"steering latent {latents} gives activations that are not finite in {dtype}; lower the strength, or "
                "load the model in float32 (--model-dtype float32)"
            )
        return x.clone().masked_scatter_(chosen[..., None], new)


def check_conflicts(interventions: Sequence[LatentIntervention]) -> None:
    """Refuse two interventions that both set the activation of one latent on the same tokens."""
    for i, first in enumerate(interventions):
        for second in interventions[:i]:
            same = first.sae is second.sae and first.hook_name == second.hook_name
            if same and first.keep_error != second.keep_error:
                raise UserError(f"interventions on one SAE at {first.hook_name} must agree on keep_error")
            if same and first.latent == second.latent and _overlap(first, second):
                raise UserError(
                    f"{type(second).__name__} and {type(first).__name__} conflict on latent {first.latent} at "
                    f"{first.hook_name}: keep one, or give them different tokens (where) or poles"
                )


def _overlap(first: LatentIntervention, second: LatentIntervention) -> bool:
    if isinstance(first.where, str) and isinstance(second.where, str) and {first.where, second.where} in _APART:
        return False
    rows = [i.where.rows for i in (first, second) if isinstance(i.where, OnRows)]
    if len(rows) == 2 and not rows[0] & rows[1]:
        return False
    return {first.signs, second.signs} != {1, -1}
