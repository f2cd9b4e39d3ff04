"""Interventions that change nothing on a text, and why: a latent that does not fire cannot be ablated or scaled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from saelab.features.firing import where_it_fires
from saelab.lm.offload import device_of
from saelab.lm.sites import locate, underlying
from saelab.steering.attachment import attach
from saelab.steering.conditions import Condition, LatentFires
from saelab.steering.generation import forward
from saelab.steering.interventions import Intervention, LatentIntervention
from saelab.steering.measure.passages import Passage


def without_effect(
    model: nn.Module, interventions: Sequence[Intervention], passages: Sequence[Passage]
) -> dict[int, list[Condition]]:
    """The places of those interventions that change no token of any passage, with what would have had to hold.

    That is the intervention's own condition, or that its latent fires, for an operation that leaves a silent latent
    silent, or both on one token. The others are in force meanwhile. An intervention that also acts on first tokens is
    not judged: there the code of an SAE means nothing.
    """
    found = {}
    for place, step in enumerate(interventions):
        needs = _needs(step)
        if not needs:
            continue
        others = [other for other in interventions if other is not step]
        held = [_held(model, step, needs, others, passage) for passage in passages]
        never = [conditions[0] for i, conditions in enumerate(needs) if not any(bool(masks[i].any()) for masks in held)]
        if never:
            found[place] = never
        elif not any(bool(torch.stack(masks).all(0).any()) for masks in held):
            found[place] = [conditions[0] for conditions in needs]
    return found


def _needs(step: Intervention) -> list[list[Condition]]:
    """What must all hold on a token for a step to change it; of each, the alternatives."""
    needs: list[list[Condition]] = [] if step.when is None else [[step.when]]
    if not isinstance(step, LatentIntervention) or not step.skip_first or not step.keep_error:
        return needs
    if not bool(step.edit(torch.zeros(1))):
        poles = (step.pole,) if step.pole else (1, -1)
        needs.append([LatentFires(step.run, step.latent, 0.0, pole) for pole in poles])
    return needs


@torch.no_grad()
def _held(
    model: nn.Module,
    step: Intervention,
    needs: Sequence[Sequence[Condition]],
    others: Sequence[Intervention],
    passage: Passage,
) -> list[Bool[Tensor, "1 length"]]:
    """For each need the tokens among those of the step on which one of its alternatives holds."""
    ids = torch.tensor([[*passage.beginning, *passage.written]], device=device_of(model))
    roles = None if passage.roles is None else torch.tensor([list(passage.roles)])
    masks = [torch.zeros(ids.shape, dtype=torch.bool) for _ in needs]
    with attach(model, others) as positions, ExitStack() as stack:

        def read(x: Tensor, place: int, condition: Condition) -> None:
            chosen = positions.now.select(step.where, step.skip_first)
            holds = condition.holds(x, positions.now).cpu()
            masks[place] |= holds & (chosen if isinstance(chosen, bool) else chosen.cpu())

        for place, alternatives in enumerate(needs):
            for condition in alternatives:
                site = locate(model, condition.hook_name)
                stack.enter_context(site.register(model, partial(read, place=place, condition=condition)))
        stack.enter_context(positions.generating(len(passage.beginning), roles))
        forward(underlying(model), ids, torch.ones_like(ids), last_only=True)
    return masks


def reason(step: Intervention, failed: Sequence[Condition]) -> str:
    """Why a step changes nothing, from what :func:`without_effect` found."""
    both = " at once" if len(failed) > 1 else ""
    return f"{' and '.join(_said(condition, step) for condition in failed)}{both} on no token that it acts on"


def _said(condition: Condition, step: Intervention) -> str:
    settings = condition.settings()
    if not isinstance(condition, LatentFires):
        return f"the probe is above {settings['above']:.3g}"
    either = isinstance(step, LatentIntervention) and step.latent == condition.latent and step.pole == 0
    sign = " −" if condition.pole < 0 else ""
    what = "fires" if either or not condition.threshold else f"is above {condition.threshold:.3g}"
    return f"latent {condition.latent}{sign} {what}"


def explained(model: nn.Module, interventions: Sequence[Intervention], passages: Sequence[Passage]) -> list[str]:
    """For each intervention that changes nothing on the passages, a sentence with the reason and where it would."""
    lines = []
    for place, failed in without_effect(model, interventions, passages).items():
        latents = [condition for condition in failed if isinstance(condition, LatentFires)]
        where = [(one.latent, where_it_fires(one.run.index, one.latent, one.pole)) for one in latents]
        said = [text if len(where) == 1 else f"latent {latent}: {text}" for latent, text in where]
        name = type(interventions[place]).operation
        lines.append("; ".join([f"{name} changes nothing here, because {reason(interventions[place], failed)}", *said]))
    return lines
