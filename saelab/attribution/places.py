"""The places at which SAEs and transcoders are spliced into a model, in the order in which the model passes them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.hook_names import layer_of
from saelab.lm.sites import Site, check_replaceable, locate, underlying
from saelab.runs import Run
from saelab.sae import SAE
from saelab.steering.generation import forward

Edit = Callable[[Tensor, Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Place:
    """One SAE and where it stands: it encodes what is at ``read`` and explains what is at ``write``.

    Both are the same for an ordinary SAE. ``layer`` numbers the places: it is the block where no two places share one,
    else their order.
    """

    run: Run
    read: Site
    write: Site
    layer: int

    @property
    def sae(self) -> SAE:
        """The SAE, in eval mode."""
        return self.run.sae

    @property
    def name(self) -> str:
        """Hook name of the place that it explains."""
        return self.write.hook_name

    @property
    def transcodes(self) -> bool:
        """Whether it reads one place and explains another."""
        return self.read.place != self.write.place

    def skipped(self, x: Float[Tensor, "n d_in"]) -> Tensor | None:
        """What an affine skip connection adds to the output; None without one."""
        found = getattr(self.sae, "skipped", None)
        return None if found is None else found(x)

    @contextmanager
    def register(self, model: nn.Module, edit: Edit) -> Iterator[None]:
        """Call ``edit(x, y)`` with the activations read and those explained; what it returns replaces ``y``."""
        with ExitStack() as stack:
            if not self.transcodes:
                stack.enter_context(self.write.register(model, lambda y: edit(y, y)))
                yield
                return
            seen: list[Tensor] = []
            stack.enter_context(self.read.register(model, lambda x: _keep(seen, x)))
            stack.enter_context(self.write.register(model, lambda y: edit(_taken(seen, self), y)))
            yield


def _keep(seen: list[Tensor], x: Tensor) -> None:
    seen[:] = [x]


def _taken(seen: list[Tensor], place: Place) -> Tensor:
    if not seen:
        raise UserError(f"{place.read.hook_name} comes after {place.write.hook_name} in a pass of this model")
    return seen.pop()


def find_places(
    model: nn.Module, runs: Sequence[Run], ids: Int[Tensor, "1 length"]
) -> tuple[list[Place], Float[Tensor, " vocabulary"]]:
    """The places of the runs, sorted by a pass of ``model`` over ``ids``, and its prediction after them.

    UserError where two runs explain the same place, where a place cannot be replaced, and for a width that is not the
    model's.
    """
    found = [Place(run, *_sites(model, run), layer=0) for run in runs]
    order, logits = _order(model, found, ids)
    found = [found[i] for i in order]
    for first, second in itertools.pairwise(found):
        if first.write.place == second.write.place:
            raise UserError(f"two SAEs explain {second.name}; give one run for each place")
    layers = [layer_of(place.name) for place in found]
    if None in layers or len(set(layers)) < len(layers):
        layers = list(range(len(found)))
    return [Place(p.run, p.read, p.write, int(layer or 0)) for p, layer in zip(found, layers)], logits


def _sites(model: nn.Module, run: Run) -> tuple[Site, Site]:
    read = locate(model, run.hook_name)
    write = check_replaceable(locate(model, getattr(run, "hook_name_out", None) or run.hook_name))
    if run.sae.selects_by_gradient:
        raise UserError(
            f"the SAE at {run.hook_name} selects latents by the gradient of the loss, which contains the next token; "
            "its codes explain nothing of a prediction"
        )
    sizes = ((read, run.sae.d_in, "reads"), (write, run.sae.W_dec.shape[1], "writes"))
    for site, width, what in sizes:
        have = site.width(model)
        if have is not None and have != width:
            raise UserError(
                f"the SAE at {run.hook_name} {what} vectors of {width}, {site.hook_name} holds {have}: it belongs to "
                "another model"
            )
    return read, write


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
