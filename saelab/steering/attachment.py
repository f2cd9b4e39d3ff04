"""``attach``: apply interventions to a model inside a ``with`` block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.sites import Site, check_replaceable, locate
from saelab.lm.structure import is_compiled
from saelab.steering.edits import LatentEdits, check_conflicts
from saelab.steering.interventions import Intervention, LatentIntervention, VectorIntervention
from saelab.steering.positions import Positions, TokenContext

Edit = Callable[[Tensor, TokenContext], Tensor | None]


@contextmanager
def attach(model: nn.Module, interventions: Intervention | Sequence[Intervention]) -> Iterator[Positions]:
    """Steer every forward pass and every ``generate`` of ``model`` inside the ``with`` block.

    ``model`` is a TransformerLens bridge or a plain Hugging Face causal LM. Interventions at one hook point act in the
    order given, except that neighbours on one SAE share one encoding and act together; hook points act in the order of
    the model's layers. Prompt and generated tokens, cached and uncached steps, padded and single texts are treated
    alike. The hooks are removed when the block ends, also by an exception. A model that ``torch.compile`` has compiled
    runs uncompiled inside the block.
    """
    interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    check_conflicts([i for i in interventions if isinstance(i, LatentIntervention)])
    # An unknown name is refused even when it would change nothing.
    sites = {name: check_replaceable(locate(model, name)) for name in {i.hook_name: None for i in interventions}}
    _check_widths(model, sites, interventions)
    by_place: dict[tuple[Any, ...], list[Intervention]] = defaultdict(list)  # a hook point may have several names
    for intervention in interventions:
        site = sites[intervention.hook_name]
        if not intervention.idle:
            by_place[site.place].append(intervention)
    with ExitStack() as stack:
        if is_compiled(model):
            # Code that was compiled before a hook was set does not know of it.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        positions = stack.enter_context(Positions().follow(model))
        for group in by_place.values():
            site, hook = sites[group[0].hook_name], _hook(_edits(group), positions)
            stack.enter_context(site.register(model, hook))
        yield positions


def _hook(edits: list[Edit], positions: Positions) -> Callable[[Tensor], Tensor | None]:
    def hook(x: Tensor) -> Tensor | None:
        new = x
        for edit in edits:
            result = edit(new, positions.now)
            new = new if result is None else result
        return None if new is x else new

    return hook


def _edits(interventions: Sequence[Intervention]) -> list[Edit]:
    """One edit per vector intervention and per run of neighbours on one SAE."""
    edits: list[Edit] = []
    group: list[LatentIntervention] = []
    for intervention in interventions:
        if isinstance(intervention, LatentIntervention):
            if group and group[0].sae is not intervention.sae:
                edits.append(LatentEdits(group))
                group = []
            group.append(intervention)
            continue
        if group:
            edits.append(LatentEdits(group))
            group = []
        if not isinstance(intervention, VectorIntervention):
            raise UserError(
                f"{type(intervention).__name__} cannot be applied; derive it from VectorIntervention or "
                "LatentIntervention"
            )
        edits.append(_vector_edit(intervention))
    return [*edits, LatentEdits(group)] if group else edits


def _vector_edit(intervention: VectorIntervention) -> Edit:
    prepared: dict[tuple[torch.device, torch.dtype], Callable[[Tensor], Tensor]] = {}

    def edit(x: Tensor, context: TokenContext) -> Tensor | None:
        mask = context.select(intervention.where, intervention.skip_first)
        if mask is False:
            return None
        change = prepared.get((x.device, x.dtype))
        if change is None:
            change = prepared[x.device, x.dtype] = intervention.prepare(x)
        return change(x) if mask is True else torch.where(mask[..., None].to(x.device), change(x), x)

    return edit


def _check_widths(model: nn.Module, sites: dict[str, Site], interventions: Sequence[Intervention]) -> None:
    for intervention in interventions:
        width, d_in = sites[intervention.hook_name].width(model), intervention.d_in
        what = "the SAE" if isinstance(intervention, LatentIntervention) else "the vector"
        if width is not None and d_in != width:
            raise UserError(
                f"{what} for {intervention.hook_name} has width {d_in}, the model's activations {width}: "
                "it belongs to another model"
            )
