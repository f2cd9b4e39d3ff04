"""Parameters, gradients and optimizer divided over the data ranks: torch's ``fully_shard``.

Between steps each process holds some latents of its dictionary part: their weights and their moments. For a step all
weights of the part are gathered; after it each process gets the sum of the gradients of its own, and updates them.

``fully_shard`` wants contiguous parameters that it divides by rows, and ``W_enc`` is ``[d_in, d_sae]`` with contiguous
columns. So the parameters live in a module of their own, a row for each latent, and the SAE gets views of them: of its
own rows between steps, of all rows inside :meth:`Engine.forward`. One process alone does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from saelab.distributed.sharding import REPLICATED
from saelab.distributed.world import Parallel
from saelab.sae import SAE

T = TypeVar("T")


class Engine(nn.Module):
    """The parameters of ``sae``, this process's part of the dictionary, divided over the data ranks.

    From then on the parameters of ``sae`` are this process's rows, until :meth:`join`.
    """

    def __init__(self, sae: SAE, parallel: Parallel) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor, Replicate, Shard

        super().__init__()
        assert parallel.mesh is not None
        self.parallel, self._sae = parallel, [sae]  # in a list, so that it is no submodule
        self.transposed = {name: _by_column(p) for name, p in sae.named_parameters()}
        for name, parameter in sae.named_parameters():
            rows = _turned(parameter.detach(), self.transposed[name]).contiguous()
            placed = [Replicate() if name in REPLICATED or parallel.dict_size == 1 else Shard(0)]
            tensor = DTensor.from_local(rows, parallel.mesh["dict"], placed, run_check=False)
            self.register_parameter(_key(name), nn.Parameter(tensor, requires_grad=parameter.requires_grad))
        # Without resharding between forward and backward: there is one module, which the backward pass needs at once.
        fully_shard(self, mesh=parallel.mesh["data"], reshard_after_forward=False)
        self.set_gradient_divide_factor(1.0)  # pyright: ignore[reportCallIssue] - losses add up to that of the batch
        self.set_force_sum_reduction_for_comms(True)  # pyright: ignore[reportCallIssue]
        self.own = {name: self._parameter(name, self._stored(name).to_local().detach()) for name in self.transposed}
        _install(sae, self.own)

    @property
    def dims(self) -> dict[str, int]:
        """The dimension along which each parameter is divided over the data ranks."""
        return {name: int(turned) for name, turned in self.transposed.items()}

    def forward(self, compute: Callable[[], T]) -> T:
        """The result of ``compute()``, during which the SAE has all weights of its dictionary part."""
        whole = {name: _turned(self._gathered(name), turned) for name, turned in self.transposed.items()}
        # Each rank sends all rows but its own, once gathering and once reducing.
        size, sent = self.parallel.data_size, sum(4 * tensor.numel() for tensor in whole.values())
        self.parallel.traffic["gradients"] += 2 * (size - 1) * sent // size
        with self._having(whole):
            return compute()

    def deliver(self) -> None:
        """Hand the gradients that the backward pass has left to the SAE's own rows."""
        for name, own in self.own.items():
            stored = self._stored(name)
            own.grad = None if stored.grad is None else _turned(stored.grad.to_local(), self.transposed[name])
            stored.grad = None

    @torch.no_grad()
    def join(self) -> None:
        """Give every process all weights of its dictionary part; all data ranks call it."""
        self.unshard()  # pyright: ignore[reportCallIssue]
        whole = {name: self._parameter(name, self._stored(name).to_local().detach().clone()) for name in self.own}
        self.reshard()  # pyright: ignore[reportCallIssue]
        _install(self._sae[0], whole)

    @torch.no_grad()
    def divide(self) -> None:
        """The inverse of :meth:`join`: each process goes on with its own rows."""
        held = dict(self._sae[0].named_parameters())
        if any(held[name] is not own for name, own in self.own.items()):
            for name, part in self.parts(held).items():
                self.own[name].copy_(part)
            _install(self._sae[0], self.own)

    def parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of tensors in the shapes of the parameters, by the parameters' names."""
        size, rank = self.parallel.data_size, self.parallel.data_rank
        found = {}
        for name, tensor in whole.items():
            dim = int(self.transposed[name])
            rows = -(-tensor.shape[dim] // size)  # as fully_shard divides: the last ones may be fewer
            start = min(rank * rows, tensor.shape[dim])
            found[name] = tensor.narrow(dim, start, min(rows, tensor.shape[dim] - start))
        return found

    def _gathered(self, name: str) -> Tensor:
        tensor = self._stored(name).to_local()
        # The memory is freed after the step, which torch refuses for what numpy has seen, as in the kernels of the CPU.
        return tensor.clone() if tensor.device.type == "cpu" else tensor

    def _parameter(self, name: str, rows: Tensor) -> nn.Parameter:
        return nn.Parameter(_turned(rows, self.transposed[name]), requires_grad=self._stored(name).requires_grad)

    def _stored(self, name: str) -> Any:
        return getattr(self, _key(name))

    @contextmanager
    def _having(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        _install(self._sae[0], tensors)
        try:
            yield
        finally:
            _install(self._sae[0], self.own)


def _install(sae: SAE, tensors: Mapping[str, Tensor]) -> None:
    """Make ``tensors`` the parameters of ``sae``; inside a step they are results of a gathering, no leaves."""
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        sae.get_submodule(module)._parameters[leaf] = tensor  # pyright: ignore[reportArgumentType]


def _key(name: str) -> str:
    return f"rows_{name.replace('.', '_')}"


def _turned(tensor: Tensor, turned: bool) -> Tensor:
    return tensor.T if turned else tensor


def _by_column(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and parameter.T.is_contiguous() and not parameter.is_contiguous()
