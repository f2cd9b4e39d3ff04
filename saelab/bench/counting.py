"""``TRITON_INTERPRET=1 python -m saelab.bench.counting``: kernels, synchronisations and bytes of a step on a GPU.

The step runs as on a GPU, on Triton kernels under their interpreter. A dispatch mode sees every operation of PyTorch,
and the one function that launches our kernels reports to it. An operation is one kernel, though sorting takes several.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from saelab import kernels
from saelab.bench import command
from saelab.data.cache import Batch
from saelab.errors import UserError
from saelab.kernels import checks
from saelab.kernels.dispatch import obstacle
from saelab.sae import SAE, build
from saelab.sae.feature_choice import FeatureChoice
from saelab.sae.mutual_choice import REFIT, MutualChoice
from saelab.training import TrainConfig, TrainState, step, train_step
from saelab.training.state import make_optimizer

# Operations that give a name to memory, or take some, and start nothing.
FREE = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
    "detach", "alias", "as_strided", "unbind", "split", "empty", "empty_like", "empty_strided", "new_empty", "unfold",
    "lift_fresh", "set_", "_reshape_alias", "diagonal", "resize_", "squeeze_", "_record_function_enter_new",
    "_record_function_exit",
}  # fmt: skip
# Operations for whose result the host waits: its value, or the size that it has.
WAITS = {
    "_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero",
    "multinomial",
}  # fmt: skip
# The encoder's product reads its matrix as its work, and the others touch a few rows of theirs.
PARTLY = {"mm", "addmm", "index", "index_select", "index_add_", "index_copy_"}
# What our kernels read and write of tensors as large as a weight matrix. Gathered rows are not a pass over a matrix.
PASSES = {
    "latents_kernel": {"dec": 1, "enc": 1, "W_dec": 1},
    "adam_kernel": {"weight": 2, "grad": 1, "first": 2, "second": 2},
}


@dataclass
class Count:
    """What was counted; ``bytes`` are of passes over tensors with as many elements as a weight matrix, or more."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    per_parameter: float = 0.0

    def launches(self) -> int:
        return self.kernels.total()


class Counting(TorchDispatchMode):
    """Counts the operations of PyTorch inside the block. ``size`` is how many elements a weight matrix has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.count, self.size = Count(), size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name in WAITS or _by_mask(name, args):
            self.count.waits[name] += 1
        if name not in FREE and name not in WAITS - {"nonzero", "bincount"}:
            self.count.kernels[name] += 1
            read = [t for t in _tensors((args, kwargs)) if t.numel() >= self.size]
            written = [t for t in _tensors(out) if t.numel() >= self.size]
            if name not in PARTLY:
                self.count.bytes[name] += sum(t.numel() * t.element_size() for t in [*read, *written])
        return out

    def launched(self, kernel: Any, grid: tuple[int, ...], operands: tuple[Any, ...], constants: Mapping) -> None:
        """Count a launch of ours."""
        if 0 in grid:
            return
        name, of = kernel.fn.__name__, dict(zip(kernel.arg_names, operands)) | dict(constants)
        self.count.kernels[name] += 1
        flags = {"dec": of.get("DEC"), "enc": of.get("ENC"), "W_dec": of.get("MEASURE") and of.get("DEC")}
        for operand, passes in PASSES.get(name, {}).items():
            tensor = of[operand]
            if flags.get(operand, True) and tensor.numel() >= self.size:
                self.count.bytes[name] += passes * tensor.numel() * tensor.element_size()


def _by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operation picks entries by a mask, and so has to know how many it marks."""
    if name not in {"index", "index_put", "index_put_"}:
        return False
    return any(picked is not None and picked.dtype == torch.bool for picked in args[1])


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from _tensors(part)
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)


@contextmanager
def counting(size: int) -> Iterator[Count]:
    """Count inside the block, with the checks left out that are made on a CPU only."""
    from saelab.kernels.triton import adam, backend, launch, ragged, residual, tally

    mode, original, on_cpu = Counting(size), launch.launch, (checks.code, checks.latent_budgets)
    modules: list[Any] = [adam, backend, ragged, residual, tally]

    def watched(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
        mode.launched(kernel, grid, operands, constants)
        with _unwatched():
            original(kernel, grid, *operands, **constants)

    try:
        for module in modules:
            module.launch = watched
        checks.code = checks.latent_budgets = lambda *_: None
        with kernels.use_backend("triton"), mode:
            yield mode.count
    finally:
        for module in modules:
            module.launch = original
        checks.code, checks.latent_budgets = on_cpu


def _unwatched() -> Any:
    return _disable_current_modes()


N, D_IN, D_SAE, K = 12, 16, 256, 4  # with fewer tokens than dimensions the pre-activations are no tensor of that size
CASES = [
    ("topk", 0), ("topk", 50), ("abs_topk", 0), ("gradient_topk", 0), ("batch_topk", 0), ("mutual_choice", 50),
    ("feature_choice", 50), ("jump_relu", 0), ("gated", 0), ("matryoshka", 0),
    ("matching_pursuit", 0),
]  # fmt: skip


def counted(variant: str, dead: int = 0, **options: Any) -> Count:
    """One step of a variant, counted as it is at the sizes of a training: with ``dead`` latents on AuxK's list.

    The sizes are small; what the kernels hold at a time is made smaller still, so that they take their large forms.
    Variants that fit a law have fitted it, and feature_choice is in its second phase.
    """
    from saelab.kernels.triton import ragged, select

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sae = build(variant, D_IN, D_SAE, l0=K, **options).train()
    settings = TrainConfig(batch_size=N, lr=1e-4, k_aux=8, dead_after=1000 * N)
    since = torch.zeros(D_SAE, dtype=torch.int64)
    state = TrainState(make_optimizer(sae), since, 1.0, float(D_IN), step=1, first_fvu=1.0)
    state.tokens_since_fired[:dead] = 10**9
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name == "b_enc":
                parameter[:dead] = -100.0
    acts, grads = (torch.randn(N, D_IN, generator=generator) for _ in range(2))
    _fit_laws(sae)
    batch = Batch(acts, grads if sae.needs_grads else None, torch.zeros(N), torch.zeros(N))
    before = select.WHOLE, ragged.SEGMENT, step.leaves_numbers
    try:
        select.WHOLE, ragged.SEGMENT, step.leaves_numbers = 64, 16, lambda *_: True
        with kernels.use_backend("triton"):
            train_step(sae, batch, settings, state, 1000)  # makes the list of dead latents, and the moments
        with counting(D_IN * D_SAE) as count:
            train_step(sae, batch, settings, state, 1000)
    finally:
        select.WHOLE, ragged.SEGMENT, step.leaves_numbers = before
    parameters = sum(parameter.numel() for parameter in sae.parameters() if parameter.dim() == 2)
    count.per_parameter = count.bytes.total() / parameters
    return count


def _fit_laws(sae: SAE) -> None:
    if isinstance(sae, MutualChoice):
        sae.density.set_(torch.arange(1.0, sae.d_sae + 1) ** -1.5)  # the rarest are under-used by the law of the others
        sae.density.total[-sae.d_sae // 8 :] *= 1e-3
        sae.seen.fill_(REFIT)
        sae.fit_law()
    if isinstance(sae, FeatureChoice):
        sae.choose(0)


@dataclass(frozen=True)
class Settings:
    """Nothing can be chosen."""


def main(args: Sequence[str] | None = None) -> None:
    """Print the counts of all cases."""
    command.options(Settings, "counting", __doc__, args)
    if (reason := obstacle("triton", "cpu")) is not None:
        raise UserError(f"Triton cannot run here ({reason}); set TRITON_INTERPRET=1")
    for variant, dead in CASES:
        count = counted(variant, dead)
        name = f"{variant}, {dead} dead latents" if dead else variant
        sys.stdout.write(
            f"{name:<28}{count.launches():5} kernels{count.waits.total():4} synchronisations"
            f"{count.per_parameter:7.1f} bytes a parameter\n"
        )


if __name__ == "__main__":
    command.run(main)
