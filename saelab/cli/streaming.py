"""The options of ``train`` and ``sweep`` that harvest while they train, through a rolling cache."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from saelab.cli.console import check_output, console, part, stages
from saelab.cli.sources import SourceOptions, open_source
from saelab.cli.variants import value_of
from saelab.data.cache import ActivationCache, Batch
from saelab.devices import pick_device
from saelab.distributed import launched
from saelab.errors import UserError
from saelab.layout import RUN, SWEEP
from saelab.sae import SAE
from saelab.training import StepMetrics, TrainConfig, batches, fit_steps
from saelab.training.checkpoints import latest_step, number_of

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# Options with which a command harvests by itself.
ASKED = ("--tokens", "--text", "--cache-gb", "--window-tokens")


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Where activations are harvested while the training reads them."""

    hook: str = "blocks.9.hook_resid_post"
    """Hook point: a TransformerLens name or a Hugging Face module path."""
    model_device: str | None = None
    """Where the language model runs; by default the device that trains."""
    cache_folder: Path | None = None
    """Folder of the rolling cache, in which the sample and the held-out documents stay as an ordinary cache; by default
    the output's name with `-cache` at its end."""

    def place(self, out: Path) -> Path:
        """The folder of the rolling cache."""
        return self.cache_folder or out.with_name(f"{out.name}-cache")


def count(text: str) -> int:
    """A number of tokens: ``1000``, ``1_000``, ``1e9``, ``500k``, ``1.5M``, ``1B``."""
    plain = text.replace("_", "").replace(",", "").lower()
    number, unit = (plain[:-1], plain[-1]) if plain[-1:] in UNITS else (plain, "")
    value = float(number) * UNITS[unit]
    if value != int(value):
        raise ValueError(f"{text} is no whole number of tokens")
    return int(value)


COUNT = PrimitiveConstructorSpec(
    nargs=1,
    metavar="N[k|M|B]",
    instance_from_str=lambda args: count(args[0]),
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


def is_asked(args: Sequence[str]) -> bool:
    """Whether the arguments of a command say that it shall harvest by itself."""
    return any(value_of(args, name) is not None for name in ASKED)


def check_asked(args: Sequence[str], n_positional: int) -> None:
    """UserError, in one line, for what a stream cannot do, before the arguments are parsed or a model is read.

    ``n_positional`` is how many arguments without a name the command has while it harvests.
    """
    from saelab.lm.hook_patterns import is_pattern

    hooks = _values(args, "--hook")
    if len(hooks) > 1 or any(map(is_pattern, hooks)):
        raise UserError(
            f"--hook {' '.join(hooks)}: one place is harvested while training; name one, or harvest several with "
            "`saelab harvest` and train on their caches"
        )
    for name in ("--target", "--d-out", "--skip"):
        if any(arg.split("=")[0] == name for arg in args):
            raise UserError(
                f"{name}: a transcoder needs the activations of two places, and one is harvested while training; run "
                "`saelab harvest --hook INPUT OUTPUT` and train on those caches with --target"
            )
    for name in ("--workers", "--at-once"):
        if value_of(args, name) is not None:
            raise UserError(f"{name}: one process trains all SAEs of a stream; leave it out, or sweep a cache")
    if len(devices := _values(args, "--device")) > 1:
        raise UserError(f"--device {' '.join(devices)}: one process trains all SAEs of a stream; name one device")
    leading = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    if len(leading) > n_positional:
        raise UserError(
            f"{leading[0]}: with --tokens, --text, --cache-gb or --window-tokens activations are harvested, not read "
            "from a cache; leave one of them out"
        )
    if launched():
        raise UserError("to harvest while training takes one process; harvest a cache first, or start without torchrun")


def _values(args: Sequence[str], option: str) -> list[str]:
    """All values that follow an option, in an argument list that is not parsed yet."""
    for place, arg in enumerate(args):
        if arg == option:
            return list(itertools.takewhile(lambda word: not word.startswith("-"), args[place + 1 :]))
        if arg.startswith(f"{option}="):
            return [arg.removeprefix(f"{option}=")]
    return []


def bases() -> tuple[list[tuple[str, Any, Any]], tuple[type, ...]]:
    """Fields and bases of a class of options, in front of the command's own."""
    # Imported here: the settings belong to the gateway of the language models.
    from saelab.harvesting.rolling import RollingConfig

    help_ = "Activations to train on, for example 500k, 20M or 1B. A text that ends earlier is begun again."
    own: list[tuple[str, Any, Any]] = [
        ("tokens", Annotated[int, COUNT, tyro.conf.arg(help=help_)], field(default=RollingConfig.tokens)),
        ("held_out", tyro.conf.Suppress[float], field(default=RollingConfig.held_out)),
        ("gradients", tyro.conf.Suppress[bool], field(default=False)),  # as the variant needs
    ]
    return own, (RollingConfig, SourceOptions, StreamOptions)


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Where to train."""

    device: str = "auto"
    """Where the SAEs are trained: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""


def sweep_options(own: type) -> type:
    """The options of a sweep that harvests: the command's ``own``, without those for several processes, since one
    reads the stream for all SAEs."""
    more, harvests = bases()
    for name in ("workers", "at_once"):
        more.append((name, tyro.conf.Suppress[int | None], field(default=None)))
    return dataclasses.make_dataclass("SweepOptions", more, bases=(*harvests, DeviceOptions, own), frozen=True)


@contextlib.contextmanager
def stream_cache(options: Any, gradients: bool, training_device: Any) -> Generator[ActivationCache]:
    """The rolling cache that the options ask for, with its kept documents harvested under a progress bar."""
    from saelab.harvesting.rolling import RollingConfig, roll

    config = dataclasses.replace(part(RollingConfig, options), gradients=gradients)
    check_output(options.out, options.overwrite, options.resume, (RUN, SWEEP))  # before anything is computed
    device = training_device if options.model_device is None else pick_device(options.model_device)
    model, source = open_source(options, device)
    folder = options.place(options.out)
    fresh = not folder.exists()
    with stages() as progress:
        found = roll(
            model, options.hook, source, folder, config,
            overwrite=options.overwrite, resume=options.resume, progress=progress,
        )  # fmt: skip
    with found as cache:
        (first, stop), rolled = cache.sample_rows, cache.rolled
        console.print(
            f"rolling: {config.tokens:,} activations of {cache.hook_name} from {source.name}, shuffled over "
            f"{rolled['window_tokens']:,} tokens, at most {config.cache_gb:g} GB in {folder}; kept there: a sample of "
            f"{stop - first:,} rows for scale and thresholds, {cache.n_split('held_out'):,} held-out rows",
            markup=False,
            soft_wrap=True,
        )
        try:
            yield cache
        except UserError:
            if fresh and not found.record.segments:  # the run cannot work, and another one would be refused the folder
                found.close()
                shutil.rmtree(folder, ignore_errors=True)
            raise


def streamed_steps(
    sae: SAE, cache: ActivationCache, config: TrainConfig, folder: Path, *, resume: bool = False, **options: Any
) -> Generator[StepMetrics]:
    """:func:`saelab.training.fit_steps` with the batches read outside of it: what ends their stream (a stop while a
    segment is waited for, a full disk) closes it, and so saves a checkpoint."""
    newest = latest_step(folder) if resume else None
    current: list[Batch] = []

    def feed() -> Generator[Batch]:
        while current:
            yield current[0]

    steps = fit_steps(sae, cache, config, folder, resume=resume, stream=feed(), **options)
    at = 0 if newest is None else number_of(newest)
    with closing(steps), closing(batches(cache, config, at, sae.needs_grads, sae.device)) as stream:
        for batch in stream:
            current[:] = [batch]
            yield next(steps)
        current.clear()
        next(steps, None)
