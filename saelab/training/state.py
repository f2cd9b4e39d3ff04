"""``TrainState``: everything besides the weights that the next step depends on, and its form on disk.

The data order and all random numbers of a step are functions of the seeds and the step number, so no state of a
generator or of the reader is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saelab import kernels
from saelab.distributed import Parallel
from saelab.distributed.engine import Engine
from saelab.errors import UserError
from saelab.sae import SAE
from saelab.training.readings import Readings

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class TrainState:
    """Everything besides the weights that the next step depends on.

    Between steps of a running generator the SAE is in units of the scaled data; :meth:`fold` and :meth:`unfold`
    convert it to raw units and back without changing a bit.
    """

    optimizer: kernels.Adam
    tokens_since_fired: Tensor  # [d_sae], int64
    scale: float  # the data are multiplied by this power of two during training
    variance: float  # mean ||x - mean||^2 of the scaled data: the normaliser of every loss term
    step: int = 0
    tokens_seen: int = 0
    ema: dict[str, Tensor] = field(default_factory=dict)  # running sums of the weights, not yet bias-corrected
    first_fvu: float = 0.0  # of the first batch; 0 before it, and in runs begun before 0.2.0
    excess: float = 0.0  # the last batch's FVU over that without training (see training.divergence); not saved
    target_scale: float | None = None  # that of a transcoder's target; ``variance`` is then the target's
    listed: Tensor | None = None  # latents that may be dead, where they are listed once in a while (training.dead)
    ahead: Tensor | None = None  # latents that a rule of the variant may mark until the list is renewed
    failed: Tensor | None = None  # on a GPU: 1 once a step has diverged, which forbids all updates from then on
    first: Tensor | None = None  # first_fvu on the device, before it is read
    readings: Readings | None = None  # of steps whose numbers are on the device
    engine: Engine | None = None  # where the parameters are divided over data ranks

    @property
    def out_scale(self) -> float:
        """What the data that are reconstructed are multiplied by."""
        return self.scale if self.target_scale is None else self.target_scale

    @torch.no_grad()
    def fold(self, sae: SAE) -> None:
        """Put ``sae`` into units of the raw data; a power of two leaves the mantissa of every number alone."""
        sae.rescale_(1 / self.out_scale, 1 / self.scale)

    @torch.no_grad()
    def unfold(self, sae: SAE) -> None:
        """The inverse of :meth:`fold`: put ``sae`` back into units of the scaled data, bit for bit."""
        sae.rescale_(self.out_scale, self.scale)

    def divide(self, sae: SAE, parallel: Parallel) -> None:
        """Leave to this process its share of the parameters, the moments and the averages; all data ranks call it."""
        if parallel.data_size == 1:
            return
        if self.engine is not None:
            self.engine.divide()
            return
        whole, held = self.optimizer, list(sae.named_parameters())
        self.engine = Engine(sae, parallel)
        self.optimizer = make_optimizer(sae)
        self.ema = {name: part.clone() for name, part in self.engine.parts(self.ema).items()}
        for name, parameter in held:
            for key, value in whole.state.get(parameter, {}).items():
                part = self.engine.parts({name: value})[name] if value.ndim else value
                self.optimizer.state[self.engine.own[name]][key] = _like(part, self.engine.own[name])

    def join(self) -> None:
        """Give the SAE whole parameters again, where they are divided over data ranks; all of them call it."""
        if self.engine is not None:
            self.engine.join()

    def keep_moments_in(self, name: str) -> None:
        """Keep the optimizer's moments in ``fp32`` or ``bf16``. Raises UserError where they are in the other one."""
        self.optimizer.moments = MOMENTS[name]
        held = {moments["exp_avg"].dtype for moments in self.optimizer.state.values() if "exp_avg" in moments}
        if held - {MOMENTS[name]}:
            other = next(key for key, dtype in MOMENTS.items() if dtype in held)
            raise UserError(f"moments={name}, but the training state has moments in {other}; continue with {other}")

    def tensors(self, sae: SAE) -> dict[str, Tensor]:
        """The state's tensors under flat names; the optimizer's moments under the parameter's name."""
        tensors = {"tokens_since_fired": self.tokens_since_fired}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        lists = {"listed": self.listed, "ahead": self.ahead}
        tensors |= {name: latents for name, latents in lists.items() if latents is not None}
        for name, parameter in sae.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
        return tensors

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        names = ("step", "tokens_seen", "scale", "variance", "first_fvu")
        of_target = {} if self.target_scale is None else {"target_scale": self.target_scale}
        return {name: getattr(self, name) for name in names} | of_target

    @classmethod
    def restore(cls, sae: SAE, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> TrainState:
        """Rebuild what :meth:`tensors` and :meth:`scalars` described, on the device of ``sae``."""
        if "tokens_since_fired" not in tensors or tensors["tokens_since_fired"].shape != (sae.d_sae,):
            raise UserError("the training state does not belong to this SAE; resume from the folder that wrote both")
        optimizer = make_optimizer(sae)
        for name, parameter in sae.named_parameters():
            moments = _named(f"optimizer.{name}.", tensors, torch.device("cpu"))
            optimizer.state[parameter].update({key: _like(value, parameter) for key, value in moments.items()})
        return cls(
            optimizer,
            tensors["tokens_since_fired"].to(sae.device),
            **scalars,
            ema=_named("ema.", tensors, sae.device),
            listed=tensors["listed"].to(sae.device) if "listed" in tensors else None,
            ahead=tensors["ahead"].to(sae.device) if "ahead" in tensors else None,
        )


def make_optimizer(sae: SAE) -> kernels.Adam:
    """Adam as in Gao et al. (2024); the schedule sets the learning rate before every step."""
    return kernels.Adam(sae.parameters(), lr=0.0, eps=6.25e-10, fused=True)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    # The fused optimizer walks parameter and moments in memory order, so they must share strides; on disk they are
    # row-major.
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _named(prefix: str, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value.to(device) for name, value in tensors.items() if name.startswith(prefix)}
