"""The base classes of steering operations; each is one change of the activations at one hook point.

Two families. A :class:`VectorIntervention` changes the activations directly, along a direction. A
:class:`LatentIntervention` encodes them, changes the activation of one latent and writes back only the difference,
``x + decode(code') - decode(code)``: what the SAE does not explain stays in place unless ``keep_error=False``.

An operation is one class. Declaring it with ``operation="name"`` registers it: ``attach`` applies it, recipes hold it,
``saelab steer --operation name`` and the app's Steering page offer it::

    class Flip(LatentIntervention, operation="flip"):
        \"""Change the sign of the latent's activation.\"""

        def change(self, values):
            return -values

An operation's own settings are dataclass fields (decorate the class with ``@dataclass(frozen=True, eq=False)``); they
are saved and restored without further code. ``amount`` names the one that the command line and the app may set.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import UserError
from saelab.runs import Run
from saelab.sae import SAE
from saelab.steering.conditions import Condition
from saelab.steering.positions import Where, check_where
from saelab.steering.schedule import Schedule
from saelab.steering.vectors import SteeringVector, Strength, parse_strength

OPERATIONS: dict[str, type[Intervention]] = {}


@dataclass(frozen=True)
class Amount:
    """The number that an operation takes: its name, and the range offered to the user."""

    field: str  # the argument of the operation's constructor
    title: str  # what the number is
    default: float
    largest: float
    step: float
    units: bool = False  # a strength, which may be a multiple of "max", "norm" or "raw"; otherwise a bare number
    signed: bool = False  # may be negative


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention(ABC):
    """One change at one hook point.

    ``where`` says on which tokens: "all", "prompt", "generated", in a chat "answer" (the assistant's messages) or
    "instruction" (the user's), a list of positions in the text (negative ones count back from the prompt's end), or a
    predicate on a :class:`~saelab.steering.positions.TokenContext`. Padding is never touched. ``skip_first`` leaves out
    each text's first token, whose activations are an attention sink of huge norm. ``when`` limits it further, to tokens
    on which a latent or a probe fires; ``schedule`` multiplies the change by a weight for each generated token.
    """

    operation: ClassVar[str] = ""  # the name it is registered under; empty for one that is not
    amount: ClassVar[Amount | None] = None  # None: it takes no number
    parts: ClassVar[tuple[str, ...]] = ()  # the fields that hold tensors: vectors, or a run

    where: Where = "all"
    skip_first: bool = False
    hook_name: str = ""  # by default that of the vector or the run
    when: Condition | None = None
    schedule: Schedule | None = None

    def __init_subclass__(cls, operation: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.operation = operation
        if not operation:
            return
        for name, other in OPERATIONS.items():
            taken = operation == name or cls.__name__ == other.__name__
            if taken and (cls.__module__, cls.__qualname__) != (other.__module__, other.__qualname__):
                raise UserError(
                    f"the steering operation {operation!r} ({cls.__name__}) is already registered by "
                    f"{other.__module__}.{other.__qualname__}; give the class and the operation another name"
                )
        OPERATIONS[operation] = cls

    def __post_init__(self) -> None:
        check_where(self.where)
        if not self.hook_name:
            object.__setattr__(self, "hook_name", self._default_hook_name())

    @abstractmethod
    def _default_hook_name(self) -> str:
        """The hook point of the vector or the run."""

    @property
    @abstractmethod
    def d_in(self) -> int:
        """Width of the activations it acts on."""

    @property
    def idle(self) -> bool:
        """Whether it changes nothing; then the model runs without a hook for it."""
        return False

    @property
    def directions(self) -> tuple[SteeringVector, ...]:
        """The steering vectors it acts along; empty for operations on a latent."""
        return ()

    def times(self, factor: float) -> Self:
        """The same intervention with its change of the activations multiplied; 0 switches it off.

        Multiplied is the change and not the operation's own number: half of a clamp goes half of the way to its value.
        """
        if not math.isfinite(factor):
            raise UserError(f"a change cannot be multiplied by {factor}; give a finite number")
        if factor == 1:
            return self
        return dataclasses.replace(self, schedule=(self.schedule or Schedule([(0, 1)])) * factor)

    def settings(self) -> dict[str, Any]:
        """The operation, its hook point, its tokens, and every field that holds no tensors, as JSON."""
        where = "predicate" if callable(self.where) else self.where
        limits: dict[str, Any] = {} if self.when is None else {"when": self.when.settings()}
        if self.schedule is not None:
            limits["schedule"] = [list(point) for point in self.schedule.points]
        return {
            "op": type(self).__name__,
            "hook_name": self.hook_name,
            "where": where if isinstance(where, str) else [int(position) for position in where],
            "skip_first": self.skip_first,
            **{name: getattr(self, name) for name in self._own_fields()},
            **limits,
        }

    def saved_settings(self) -> dict[str, Any]:
        """The settings as a recipe holds them, with no value that depends on the feature index."""
        return self.settings()

    @classmethod
    @abstractmethod
    def from_settings(
        cls, settings: Mapping[str, Any], vectors: Sequence[SteeringVector] = (), run: Run | None = None
    ) -> Self:
        """The intervention that a recipe holds, from ``saved_settings()`` and its vectors or its run."""

    @classmethod
    @abstractmethod
    def on_latent(
        cls, run: Run, latent: int, amount: Strength | None = None, *, pole: int = 1, where: Where = "all"
    ) -> Self:
        """The operation on one pole of one latent, with the number that ``amount`` describes."""

    @classmethod
    def summary(cls) -> str:
        """The first line of its docstring, for the help of the command line and of the app."""
        text = (cls.__dict__.get("__doc__") or "").strip()
        # A dataclass without a docstring is given its signature.
        return "" if text.startswith(f"{cls.__name__}(") else text.split("\n")[0].replace("``", "")

    @classmethod
    def _own_fields(cls) -> list[str]:
        common = {f.name for f in dataclasses.fields(Intervention)}
        return [f.name for f in dataclasses.fields(cls) if f.init and f.name not in common | set(cls.parts)]

    @classmethod
    def _arguments(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments in saved settings; KeyError for a missing one, so that none is guessed."""
        where = settings["where"] if isinstance(settings["where"], str) else tuple(settings["where"])
        common = {"where": where, "skip_first": settings["skip_first"], "hook_name": settings["hook_name"]}
        if settings.get("schedule") is not None:  # "when" holds tensors: the recipe adds it
            common["schedule"] = Schedule(settings["schedule"])
        return common | {name: settings[name] for name in cls._own_fields()}

    @classmethod
    def _amount_argument(cls, amount: Strength | None) -> dict[str, Any]:
        if amount is None:
            return {}
        if cls.amount is None:
            raise UserError(f"{cls.operation} takes no number, so {amount!r} has no meaning; leave it out")
        if not cls.amount.units:
            number, unit = parse_strength(amount)
            if unit:
                example = f"{cls.amount.default:g}"
                raise UserError(f"{cls.operation} takes a {cls.amount.title} such as {example}, not {amount}")
            amount = number
        return {cls.amount.field: amount}


@dataclass(frozen=True, eq=False)
class VectorIntervention(Intervention):
    """A change of the activations along a direction, which the field that ``parts`` names holds (or several)."""

    parts: ClassVar[tuple[str, ...]] = ("vector",)

    @property
    def directions(self) -> tuple[SteeringVector, ...]:
        found = getattr(self, self.parts[0])
        return (found,) if isinstance(found, SteeringVector) else tuple(found)

    @property
    def d_in(self) -> int:
        return self.directions[0].d_in

    @abstractmethod
    def prepare(self, like: Tensor) -> Callable[[Float[Tensor, "... d_in"]], Float[Tensor, "... d_in"]]:
        """The function from the activations to the new ones, for tensors of the type and on the device of ``like``."""

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], vectors: Sequence[SteeringVector] = (), run: Run | None = None
    ) -> Self:
        make: Any = cls
        return make(vectors[0] if len(vectors) == 1 else list(vectors), **cls._arguments(settings))

    @classmethod
    def on_vector(cls, vector: SteeringVector, amount: Strength | None = None, *, where: Where = "all") -> Self:
        """The operation along ``vector``, with the number that ``amount`` describes."""
        make: Any = cls  # the vector is the first field, which every operation declares itself
        return make(vector, where=where, **cls._amount_argument(amount))

    @classmethod
    def on_latent(
        cls, run: Run, latent: int, amount: Strength | None = None, *, pole: int = 1, where: Where = "all"
    ) -> Self:
        return cls.on_vector(SteeringVector.from_latent(run, latent, pole), amount, where=where)

    def _default_hook_name(self) -> str:
        return self.directions[0].hook_name


@dataclass(frozen=True, eq=False)
class LatentIntervention(Intervention):
    """A change to the activation of one latent. A transcoder's is made where it writes, from what it reads.

    ``pole`` limits it to activations of one sign (``1`` or ``-1``); 0 means both.
    """

    parts: ClassVar[tuple[str, ...]] = ("run",)

    run: Run
    latent: int
    pole: int = field(default=0, kw_only=True)
    keep_error: bool = field(default=True, kw_only=True)
    # The code of the first token is meaningless, because SAEs are trained without it.
    skip_first: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.run, Run):
            raise UserError(
                f"{type(self).__name__} takes a Run, not a {type(self.run).__name__}; open a folder with "
                "Run.open(path), wrap an SAE in memory with Run(sae, hook_name)"
            )
        super().__post_init__()
        if self.pole not in (-1, 0, 1):
            raise UserError(f"pole {self.pole!r} is neither + nor -; give 1, -1, or 0 for both")
        self.run.check_latent(self.latent)

    @property
    def sae(self) -> SAE:
        """The SAE whose code is changed."""
        return self.run.sae

    @property
    def d_in(self) -> int:
        return self.sae.d_out

    @property
    def signs(self) -> int:
        """The sign of the activations it sets, 0 for both; two interventions may share a latent but not a sign."""
        # An operation that overrides ``edit`` may change either sign, whatever its pole.
        return self.pole if type(self).edit is LatentIntervention.edit else 0

    def edit(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The latent's new activations from its present ones, zeros where it does not fire."""
        new = self.change(values)
        return new if self.pole == 0 else torch.where(values * self.pole > 0, new, values)

    def change(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The new activations on the intervention's pole. Override this, or :meth:`edit` to decide on both."""
        raise NotImplementedError

    def activation(self, strength: Strength, pole: int) -> float:
        """A strength as an activation of the latent; "1max" is its largest activation on ``pole``."""
        number, unit = parse_strength(strength)
        if unit == "":
            return number
        vector = SteeringVector.from_latent(self.run, self.latent, pole)
        return pole * vector.length(strength) / vector.norm

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], vectors: Sequence[SteeringVector] = (), run: Run | None = None
    ) -> Self:
        if run is None:
            raise UserError(f"{cls.__name__} needs the SAE of its latent")
        return cls(run, **cls._arguments(settings))

    @classmethod
    def on_latent(
        cls, run: Run, latent: int, amount: Strength | None = None, *, pole: int = 1, where: Where = "all"
    ) -> Self:
        return cls(run, latent, pole=pole, where=where, **cls._amount_argument(amount))

    def _default_hook_name(self) -> str:
        return self.run.hook_name_out
