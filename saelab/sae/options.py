"""The options of a variant are the arguments of its constructor: read them, and record them as its configuration.

A constructor that takes ``**options`` and passes them on has those of its parent class as well.
"""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from typing import Any

from torch import nn

from saelab.errors import UserError, check_choices

SIZES = ("d_in", "d_sae", "d_out")  # arguments of every constructor that are not options of the variant
UNNAMED = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}


def constructors(cls: type) -> Iterator[Callable[..., None]]:
    """The constructors that declare the arguments of ``cls``: its own, and its parents' if it has ``**options``."""
    for parent in cls.__mro__:
        if parent is nn.Module:
            return
        constructor = vars(parent).get("__init__")
        if constructor is None or not issubclass(parent, nn.Module):
            continue
        yield constructor
        if Parameter.VAR_KEYWORD not in {p.kind for p in inspect.signature(constructor).parameters.values()}:
            return


def signature(cls: type) -> inspect.Signature:
    """All arguments that ``cls(...)`` takes."""
    found: dict[str, Parameter] = {}
    by_keyword = False
    for constructor in constructors(cls):
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in UNNAMED:
                kind = Parameter.KEYWORD_ONLY if by_keyword else parameter.kind
                found.setdefault(parameter.name, parameter.replace(kind=kind))
        by_keyword = by_keyword or Parameter.VAR_POSITIONAL not in {p.kind for p in parameters}
    return inspect.Signature(sorted(found.values(), key=lambda p: p.kind))


def defaults(cls: type) -> dict[str, Any]:
    """The defaults of a variant's options, for the options that have one."""
    known = signature(cls).parameters.items()
    return {name: parameter.default for name, parameter in known if parameter.default is not Parameter.empty}


def options(cls: type) -> dict[str, tuple[Any, Any]]:
    """Type and default of each of a variant's options, by name; UserError for one that lacks either."""
    hints: dict[str, Any] = {}
    for constructor in constructors(cls):
        hints = {**typing.get_type_hints(constructor), **hints}
    found = {}
    for name, parameter in signature(cls).parameters.items():
        if name in SIZES:
            continue
        if parameter.default is Parameter.empty:
            raise UserError(f"option {name} of {cls.__qualname__} has no default; give it one in the constructor")
        if name not in hints:
            raise UserError(f"option {name} of {cls.__qualname__} has no type; annotate it in the constructor")
        found[name] = hints[name], parameter.default
    return found


def record(cls: Any) -> None:
    """Make the constructor of ``cls`` store its arguments, defaults included, in ``self.config`` before it runs."""
    cls.__signature__ = signature(cls)
    original = vars(cls).get("__init__")
    if original is None:
        return

    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if "config" in vars(self):  # called by a subclass' constructor, with arguments of its choice
            _check_passed_on(self, inspect.signature(original), args, kwargs)
            original(self, *args, **kwargs)
            return
        vars(self)["config"] = configuration(type(self), args, kwargs)
        check_choices(vars(self)["config"], _choices(type(self)))
        own = inspect.signature(original).parameters
        vars(self)["_left_out"] = {name for name in signature(type(self)).parameters if name not in {*own, *kwargs}}
        original(self, *args, **kwargs)
        del vars(self)["_left_out"]

    cls.__init__ = construct


def _choices(cls: type) -> dict[str, Any]:
    """The types of the options of ``cls``, of the constructors in which one is a choice of words."""
    hints: dict[str, Any] = {}
    for constructor in constructors(cls):
        # Others are left alone: they may be annotated with names that only a type checker sees.
        if any("Literal" in str(annotation) for annotation in constructor.__annotations__.values()):
            hints = {**typing.get_type_hints(constructor), **hints}
    return hints


def _check_passed_on(sae: Any, call: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a constructor that takes an option through ``**options`` and sets it itself."""
    left_out = vars(sae).get("_left_out", set())
    for name in left_out & set(call.bind(sae, *args, **kwargs).arguments):
        raise UserError(
            f"{type(sae).__qualname__} takes the option {name} through **options and sets it itself; name the "
            "options that it takes in its constructor instead"
        )
    left_out -= set(call.parameters)


def configuration(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``cls(*args, **kwargs)`` by name; without those in ``only_if_set`` that have their default.

    Raises TypeError where the call would.
    """
    call = signature(cls)
    bound = call.bind(*args, **kwargs)
    bound.apply_defaults()
    omitted = {name for parent in cls.__mro__ for name in vars(parent).get("only_if_set", ())}
    return {
        name: value
        for name, value in bound.arguments.items()
        if name not in omitted or value != call.parameters[name].default
    }


def check_json(config: dict[str, Any], name: str) -> None:
    """UserError for a configuration that cannot be saved."""
    for option, value in config.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{option}={value!r:.60} of the variant {name} cannot be saved as JSON; an option is a number, a text, "
                "a flag, None, or a list of these"
            ) from error


def with_l0(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with ``l0``, latents per token, as the option that says so in this variant: ``k`` of a budget, say.

    UserError where both are given and differ, or ``l0`` is not what that option can be.
    """
    config, own = dict(config), cls.l0_option
    if own == "l0" or "l0" not in config or own not in signature(cls).parameters:
        return config
    l0 = config.pop("l0")
    if l0 is None:
        return config
    if config.get(own, l0) != l0:
        raise UserError(f"l0={l0} and {own}={config[own]} are the same option of {cls.variant}; give one of them")
    if options(cls)[own][0] is int and not isinstance(l0, int):
        raise UserError(f"l0={l0} must be a whole number for {cls.variant}, whose {own} is one")
    return {**config, own: l0}
