"""``attach``: apply interventions to a model inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.route import Reader
from saelab.lm.sites import Site, check_replaceable, locate
from saelab.lm.structure import is_compiled
from saelab.steering.conditions import Condition, Gate, check_order
from saelab.steering.edits import Gates, LatentEdits, check_conflicts, selected
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
    gates = {i.when: Gate(i.when) for i in interventions if i.when is not None}
    read = {condition: locate(model, condition.hook_name) for condition in gates}
    _check_conditions(model, read, interventions)
    by_place: dict[tuple[Any, ...], tuple[Site, list[Gate], list[Intervention]]] = {}
    for condition, gate in gates.items():
        by_place.setdefault(read[condition].place, (read[condition], [], []))[1].append(gate)
    for intervention in interventions:
        site = sites[intervention.hook_name]  # a hook point may have several names
        if not (intervention.idle or (intervention.schedule is not None and intervention.schedule.idle)):
            by_place.setdefault(site.place, (site, [], []))[2].append(intervention)
    with ExitStack() as stack:
        if is_compiled(model):
            # Code that was compiled before a hook was set does not know of it.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        positions = stack.enter_context(Positions().follow(model))
        readers: list[Reader] = []
        for site, asked, group in by_place.values():
            edits = _edits(group, gates)
            readers += _connect(model, edits, site)
            stack.enter_context(site.register(model, _hook(asked, edits, positions)))
        for reader in readers:  # after the edits, which they shall see where both are at one place
            stack.enter_context(reader.follow(model))
        yield positions


def _connect(model: nn.Module, edits: Sequence[Edit], site: Site) -> list[Reader]:
    """Readers for those edits at ``site`` that are by transcoders, which read at another place."""
    readers = []
    for edit in edits:
        if isinstance(edit, LatentEdits) and edit.source:
            reader = Reader(locate(model, edit.source))
            edit.read = partial(reader.take, site, last=False)
            readers.append(reader)
    return readers


def _hook(asked: list[Gate], edits: list[Edit], positions: Positions) -> Callable[[Tensor], Tensor | None]:
    def hook(x: Tensor) -> Tensor | None:
        for gate in asked:
            gate.read(x, positions.now)
        new = x
        for edit in edits:
            result = edit(new, positions.now)
            new = new if result is None else result
        return None if new is x else new

    return hook


def _edits(interventions: Sequence[Intervention], gates: Gates) -> list[Edit]:
    """One edit per vector intervention and per run of neighbours on one SAE."""
    edits: list[Edit] = []
    group: list[LatentIntervention] = []
    for intervention in interventions:
        if isinstance(intervention, LatentIntervention):
            if group and group[0].sae is not intervention.sae:
                edits.append(LatentEdits(group, gates))
                group = []
            group.append(intervention)
            continue
        if group:
            edits.append(LatentEdits(group, gates))
            group = []
        if not isinstance(intervention, VectorIntervention):
            raise UserError(
                f"{type(intervention).__name__} cannot be applied; derive it from VectorIntervention or "
                "LatentIntervention"
            )
        edits.append(_vector_edit(intervention, gates))
    return [*edits, LatentEdits(group, gates)] if group else edits


def _vector_edit(intervention: VectorIntervention, gates: Gates) -> Edit:
    prepared: dict[tuple[torch.device, torch.dtype], Callable[[Tensor], Tensor]] = {}

    def edit(x: Tensor, context: TokenContext) -> Tensor | None:
        mask = selected(intervention, context, gates)
        if mask is False:
            return None
        change = prepared.get((x.device, x.dtype))
        if change is None:
            change = prepared[x.device, x.dtype] = intervention.prepare(x)
        new = change(x)
        if intervention.schedule is not None:
            new = x + intervention.schedule.weights(context)[:, None].to(x) * (new - x)
        return new if mask is True else torch.where(mask[..., None].to(x.device), new, x)

    return edit


def _check_conditions(model: nn.Module, read: dict[Condition, Site], interventions: Sequence[Intervention]) -> None:
    for condition, site in read.items():
        width = site.width(model)
        if width is not None and condition.d_in != width:
            raise UserError(
                f"the condition at {condition.hook_name} reads width {condition.d_in}, the model's activations have "
                f"{width}: it belongs to another model"
            )
    for intervention in interventions:
        if intervention.when is not None:
            check_order(intervention.when, intervention.hook_name)


def _check_widths(model: nn.Module, sites: dict[str, Site], interventions: Sequence[Intervention]) -> None:
    for intervention in interventions:
        width, d_in = sites[intervention.hook_name].width(model), intervention.d_in
        what = "the SAE" if isinstance(intervention, LatentIntervention) else "the vector"
        if width is not None and d_in != width:
            raise UserError(
                f"{what} for {intervention.hook_name} has width {d_in}, the model's activations {width}: "
                "it belongs to another model"
            )
