"""Adam with what a training step can hand it: a factor on the gradient, a flag that forbids the update, norms of rows.

On a GPU one kernel of ours reads weight, gradient and moments once and writes weight and moments once: 28 bytes a
parameter, and 20 with moments in bfloat16. On a CPU PyTorch's fused Adam does it, which copies what is not contiguous:
measured on 16384 x 576 parameters, 139 ms a step against 24. The update acts on single entries, so the transposed
matrix, whose memory is contiguous, can be passed instead.

Moments in bfloat16 are rounded up or down at random, in proportion: rounded to the nearest, the second moment would
never fall, as a step changes it by a thousandth. The random bits are a function of entry and step, so runs repeat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saelab.kernels.dispatch import backend

BLOCK = 1 << 20  # entries that the plain form updates at a time
MASK = 0xFFFFFFFF


class Adam(torch.optim.Adam):
    """``torch.optim.Adam`` with the same results, on a CPU to the bit, and state in the parameter's shape and layout.

    ``moments`` is the dtype in which both moments are kept, float32 or bfloat16.
    """

    def __init__(self, params: Any, *args: Any, moments: torch.dtype = torch.float32, **options: Any) -> None:
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments={moments} is neither torch.float32 nor torch.bfloat16")
        super().__init__(params, *args, **options)
        self.moments = moments

    @torch.no_grad()
    def update(
        self,
        factor: Tensor | None = None,
        skip: Tensor | None = None,
        scale: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """One step with gradients times ``factor``; none at all where ``skip`` (float32, a number) is not 0.

        ``scale`` gives factors ``[rows]`` that the rows of a parameter are multiplied by before the step.
        """
        if self._is_ours():
            self._update(factor, skip, scale or {})
            return
        for parameter, rows in (scale or {}).items():
            parameter.mul_(rows[:, None])
        self.grad_scale = None if factor is None else factor.float().reciprocal()
        self.found_inf = None if skip is None else skip.float()
        self.step()

    def _is_ours(self) -> bool:
        first = self.param_groups[0]["params"][0]
        return self.moments == torch.bfloat16 or backend(first) == "triton"

    def _update(self, factor: Tensor | None, skip: Tensor | None, scale: Mapping[Tensor, Tensor]) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                count = state["step"].numpy()  # on the CPU: nothing to launch, nothing to wait for
                count += 1
                step = int(count)
                numbers = beta1, beta2, lr / (1 - beta1**step), math.sqrt(1 - beta2**step), group["eps"]
                grad = parameter.grad
                if grad.stride() != parameter.stride():
                    grad = torch.empty_like(parameter).copy_(grad)
                moments = _in_memory_order(state["exp_avg"]), _in_memory_order(state["exp_avg_sq"])
                tensors = _in_memory_order(parameter), _in_memory_order(grad), *moments
                rows = scale.get(parameter)
                if backend(parameter) == "triton":
                    from saelab.kernels.triton.adam import update

                    update(*tensors, rows, factor, skip, numbers, seeds(step))
                else:
                    _plain_update(*tensors, rows, factor, skip, numbers, seeds(step))

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.moments)
        if state["step"].device.type != "cpu":  # a checkpoint's comes with the weights
            state["step"] = state["step"].cpu()
        return state

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:  # pyright: ignore
        """Collect a group's tensors as the parent does; hand over transposed those that are column-major throughout.

        If a release of PyTorch stops calling this method, updates stay correct and become slow.
        """
        has_complex = super()._init_group(group, *lists)
        for i in range(len(lists[0])):
            matrices = [tensors for tensors in lists if i < len(tensors) and tensors[i].dim() == 2]
            if matrices and all(_column_major(tensors[i]) for tensors in matrices):
                for tensors in matrices:
                    tensors[i] = tensors[i].T
        return has_complex


def seeds(step: int) -> tuple[int, int]:
    """Of the random bits of the two moments in a step."""
    return tuple((2 * step + which) * 0x9E3779B1 & 0x7FFFFFFF for which in range(2))  # type: ignore[return-value]


def _plain_update(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    rows: Tensor | None,
    factor: Tensor | None,
    skip: Tensor | None,
    numbers: tuple[float, float, float, float, float],
    seeds: tuple[int, int],
) -> None:
    """The definition of the update, in pieces, for tensors that are contiguous."""
    beta1, beta2, rate, root, eps = numbers
    if skip is not None and bool(skip):
        return
    if rows is not None:
        weight.mul_(rows[:, None])
    weight, grad, first, second = (t.view(-1) for t in (weight, grad, first, second))
    for start in range(0, weight.numel(), BLOCK):
        part = slice(start, start + BLOCK)
        g = grad[part] if factor is None else grad[part] * factor
        m = first[part].float().lerp_(g, 1 - beta1)
        v = second[part].float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
        weight[part] -= rate * m / (v.sqrt() / root + eps)
        for moment, value, seed in ((first, m, seeds[0]), (second, v, seeds[1])):
            moment[part] = value if moment.dtype == value.dtype else rounded(value, start, seed)


def rounded(x: Tensor, start: int, seed: int) -> Tensor:
    """Float32 numbers in bfloat16, up or down at random, in proportion; ``start`` is the first one's place."""
    bits = (torch.arange(start, start + x.numel(), device=x.device) ^ seed) & MASK
    for shift, prime in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * prime) & MASK
    bits ^= bits >> 16
    drawn = ((x.view(torch.int32).long() + (bits & 0xFFFF)) & 0xFFFF0000).to(torch.int32)
    return torch.where(x.isfinite(), drawn.view(torch.float32), x).bfloat16()


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.dim() == 2 and _column_major(tensor) else tensor


def _column_major(matrix: Tensor) -> bool:
    return matrix.T.is_contiguous() and not matrix.is_contiguous()
