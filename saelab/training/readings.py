"""Numbers of training steps that are left where they were computed until somebody asks for them.

Reading a number from a GPU waits for everything that was started before. So a step leaves its numbers on the device;
they come over together, every ``READ_EVERY`` steps, or when one of them is asked for. On a CPU they are read at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.devices import in_float64

READ_EVERY = 50


class Numbers(NamedTuple):
    """What a step reports besides its place in the run."""

    loss: float
    fvu: float
    l0: float
    dead: int
    grad_norm: float
    terms: dict[str, float]
    diagnostics: dict[str, float]


class StepMetrics:
    """What one step reports. ``fvu`` is of this batch, against the variance of the whole cache.

    ``step``, ``tokens`` and ``lr`` are known at once. To ask for any other number reads those of all steps so far from
    the device, and raises :class:`saelab.training.Diverged` if one of these steps diverged.
    """

    def __init__(self, step: int, tokens: int, lr: float, read: Callable[[StepMetrics], Numbers]) -> None:
        self.step, self.tokens, self.lr = step, tokens, lr
        self._read, self._numbers = read, None

    @property
    def known(self) -> bool:
        """Whether the numbers have been read, so that asking for them does not wait."""
        return self._numbers is not None

    def read(self) -> Numbers:
        """All numbers."""
        return self._read(self) if self._numbers is None else self._numbers

    def settle(self, numbers: Numbers) -> None:
        """Give it the numbers that were read."""
        self._numbers = numbers

    @property
    def loss(self) -> float:
        """The whole objective."""
        return self.read().loss

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained of this batch, against the variance of the whole cache."""
        return self.read().fvu

    @property
    def l0(self) -> float:
        """Active latents per token."""
        return self.read().l0

    @property
    def dead(self) -> int:
        """Latents that have not fired for long."""
        return self.read().dead

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient before clipping."""
        return self.read().grad_norm

    @property
    def terms(self) -> dict[str, float]:
        """Weighted loss terms besides the reconstruction."""
        return self.read().terms

    @property
    def diagnostics(self) -> dict[str, float]:
        """The variant's own numbers, a threshold for instance."""
        return self.read().diagnostics

    def row(self) -> dict[str, Any]:
        """One flat record for ``metrics.jsonl``."""
        found = self.read()
        row = {"step": self.step, "tokens": self.tokens, "loss": found.loss, "fvu": found.fvu, "l0": found.l0}
        row |= {"dead": found.dead, "lr": self.lr, "grad_norm": found.grad_norm}
        return {**row, **found.terms, **found.diagnostics}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepMetrics) and self.row() == other.row()

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"StepMetrics({self.row() if self.known else f'step={self.step}, not read yet'})"


class Readings:
    """The steps whose numbers are still on the device, oldest first.

    ``digest`` makes a step's :class:`Numbers` of its number and its raw numbers by name; it is called once for each
    step, in order, and may raise.
    """

    def __init__(self, digest: Callable[[int, dict[str, float]], Numbers]) -> None:
        self.digest = digest
        self._waiting: list[tuple[StepMetrics, list[str], Tensor]] = []
        self._failed: Exception | None = None

    def add(self, metrics: StepMetrics, values: Mapping[str, Tensor | float]) -> None:
        """Keep a step's numbers, tensors on the device or numbers that the host knows."""
        self._waiting.append((metrics, list(values), together(values)))

    def read(self) -> None:
        """Bring all numbers over and digest them. What a step raised is raised for all later ones, too."""
        if self._failed is not None:
            raise self._failed
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        flat, start = torch.cat([values for *_, values in waiting]).tolist(), 0
        for metrics, names, _ in waiting:
            raw = dict(zip(names, flat[start : start + len(names)]))
            start += len(names)
            try:
                metrics.settle(self.digest(metrics.step, raw))
            except Exception as error:
                self._failed = error
                raise

    def of(self, metrics: StepMetrics) -> Numbers:
        """The numbers of one step."""
        self.read()
        return metrics.read()


def together(values: Mapping[str, Tensor | float]) -> Tensor:
    """The numbers as one float64 vector on the device of the tensors among them."""
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    if len(tensors) == len(values) and len({(t.dtype, t.device) for t in tensors}) == 1:
        return in_float64(torch.stack([t.detach() for t in tensors]))
    where = in_float64(tensors[0]).device if tensors else torch.device("cpu")
    found = []
    for value in values.values():
        if isinstance(value, Tensor):
            found.append(in_float64(value.detach()).to(where))
        else:
            found.append(torch.full((), float(value), dtype=torch.float64, device=where))  # no copy from the host
    return torch.stack(found)
