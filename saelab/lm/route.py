"""From where an SAE reads to where it writes: one place, or two of a transcoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.sites import Site, check_replaceable, locate

Edit = Callable[[Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Route:
    """Two places of one model; the same one twice for an SAE that reconstructs what it reads."""

    read: Site
    write: Site

    @property
    def same(self) -> bool:
        """Whether both are one place."""
        return self.read.place == self.write.place

    @contextmanager
    def register(self, model: nn.Module, edit: Edit) -> Iterator[None]:
        """Call ``edit(x, y)`` in every forward pass inside the ``with`` block: ``x`` is read, ``y`` is written to.

        Both are ``[batch, position, width]`` of the same pass; ``x`` is ``y`` where the places are the same. The
        activations at the place that is written to are replaced by what ``edit`` returns; None leaves them unchanged.
        """
        if self.same:
            with self.write.register(model, lambda y: edit(y, y)):
                yield
            return
        reader = Reader(self.read)
        with reader.follow(model), self.write.register(model, lambda y: edit(reader.take(self.write), y)):
            yield


class Reader:
    """Keeps what a place holds in the present forward pass, for what happens at another place later in it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._held: Tensor | None = None

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Read inside the ``with`` block; edits at the same place that were registered before are seen."""

        def keep(x: Tensor) -> None:
            self._held = x.clone()  # later modules may write into it

        try:
            with self.site.register(model, keep):
                yield
        finally:
            self._held = None

    def take(self, writer: Site, last: bool = True) -> Tensor:
        """The activations of this pass. ``last`` forgets them. Raises UserError where the place was not reached yet."""
        held = self._held
        if held is None:
            raise UserError(
                f"{writer.hook_name} comes before {self.site.hook_name} in the model, so what is read there cannot "
                "be written here; a target must lie at or behind its input"
            )
        if last:
            self._held = None
        return held


def route(model: nn.Module, hook_name: str, hook_name_out: str = "") -> Route:
    """The places of an SAE that reads at ``hook_name`` and writes at ``hook_name_out`` (by default the same).

    UserError where the model lacks one of them, or what is written there would not reach the later layers in full.
    """
    read = locate(model, hook_name)
    write = locate(model, hook_name_out) if hook_name_out else read
    return Route(read, check_replaceable(write))
