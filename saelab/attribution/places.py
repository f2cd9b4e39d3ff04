"""The places at which SAEs and transcoders are spliced into a model, in the order in which the model passes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.hook_names import layer_of
from saelab.lm.route import Route, route
from saelab.lm.sites import Site, underlying
from saelab.runs import Run
from saelab.sae import SAE
from saelab.steering.generation import forward


@dataclass(frozen=True, eq=False)
class Place:
    """One SAE or transcoder and where it stands: it encodes what its route reads and explains what it writes to.

    ``layer`` numbers the places: it is the block where no two places share one, else their order.
    """

    run: Run
    route: Route
    layer: int

    @property
    def sae(self) -> SAE:
        """The SAE, in eval mode."""
        return self.run.sae

    @property
    def write(self) -> Site:
        """The place that it explains."""
        return self.route.write

    @property
    def name(self) -> str:
        """Hook name of the place that it explains."""
        return self.write.hook_name


def find_places(
    model: nn.Module, runs: Sequence[Run], ids: Int[Tensor, "1 length"]
) -> tuple[list[Place], Float[Tensor, " vocabulary"]]:
    """The places of the runs, sorted by a pass of ``model`` over ``ids``, and its prediction after them.

    UserError where two runs explain the same place, where a place cannot be replaced, and for a width that is not the
    model's.
    """
    found = [Place(run, _route(model, run), layer=0) for run in runs]
    order, logits = _order(model, found, ids)
    found = [found[i] for i in order]
    for first, second in itertools.pairwise(found):
        if first.write.place == second.write.place:
            raise UserError(f"two SAEs explain {second.name}; give one run for each place")
    layers = [layer_of(place.name) for place in found]
    if None in layers or len(set(layers)) < len(layers):
        layers = list(range(len(found)))
    return [Place(p.run, p.route, int(layer or 0)) for p, layer in zip(found, layers)], logits


def _route(model: nn.Module, run: Run) -> Route:
    found = route(model, run.hook_name, run.hook_name_out)
    if run.sae.selects_by_gradient:
        raise UserError(
            f"the SAE at {run.hook_name} selects latents by the gradient of the loss, which contains the next token; "
            "its codes explain nothing of a prediction"
        )
    for site, width, what in ((found.read, run.sae.d_in, "reads"), (found.write, run.sae.d_out, "writes")):
        have = site.width(model)
        if have is not None and have != width:
            raise UserError(
                f"the SAE at {run.hook_name} {what} vectors of {width}, {site.hook_name} holds {have}: it belongs to "
                "another model"
            )
    return found


@torch.no_grad()
def _order(model: nn.Module, places: Sequence[Place], ids: Tensor) -> tuple[list[int], Tensor]:
    passed: list[int] = []
    with ExitStack() as stack:
        for i, place in enumerate(places):
            stack.enter_context(place.write.register(model, lambda _, i=i: passed.append(i)))
        logits = forward(underlying(model), ids, torch.ones_like(ids), last_only=True)[0]
    if missing := set(range(len(places))) - set(passed):
        raise UserError(f"{places[missing.pop()].name} is no part of a pass of this model; choose another hook point")
    return list(dict.fromkeys(passed)), logits[0, -1]
