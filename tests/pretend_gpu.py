"""A second device in a process without one: tensors that say they are on it and refuse to meet those that do not.

Their values stay in the CPU's memory, so that everything is computed; only the rule that devices may not mix is added.
Nothing below Python is watched: autograd, and extensions that read tensors themselves. ``mps`` refuses float64, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

CUDA, MPS = torch.device("cuda", 0), torch.device("mps", 0)


class Remote(Tensor):
    """A tensor on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def remote(x: Any) -> Any:
    return x.as_subclass(Remote) if isinstance(x, Tensor) and not isinstance(x, Remote) else x


def local(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Remote) else x


def move(module: nn.Module) -> nn.Module:
    """The parameters and buffers of a module on the pretended device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = remote(parameter.detach())  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            part._buffers[name] = remote(buffer)
    return module


_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
# What reads a tensor of another device, or writes into one, as torch does.
_FREE = {torch._has_compatible_shallow_copy_type, Tensor.tolist, Tensor.item, Tensor.__repr__, Tensor.copy_}
_NAMES = {torch.device, torch._C._nn._parse_to}  # what only reads the name of a device
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put}


class PretendGpu(TorchFunctionMode):
    """While active, ``device`` is one, and ``module.to`` moves to it and from it."""

    def __init__(self, device: torch.device = CUDA) -> None:
        super().__init__()
        self.device = device

    def __enter__(self) -> PretendGpu:
        # Modules take a new parameter instead of overwriting the old one's values, which would keep its class.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch.__future__.set_overwrite_module_params_on_conversion(False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # requires_grad_ gives back its argument, a leaf; autograd.grad looks its arguments up in the graph.
        if func in _NAMES or func in (Tensor.requires_grad_, torch.autograd.grad):
            return func(*args, **kwargs)
        found = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.device if isinstance(args[0], Remote) else func(*args)
        if getattr(func, "__name__", "") in ("__get__", "__set__"):  # of attributes such as grad and is_leaf
            out = func(*args)
            return remote(out) if isinstance(args[0], Remote) else out
        target = isinstance(found[0], Remote) if found else False
        devices = [x for x in tree_iter((args, kwargs)) if _names_device(x)]
        like = isinstance(args[1], Remote) if func in _MOVES and len(args) > 1 and isinstance(args[1], Tensor) else None
        if func is Tensor.numpy and target:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")
        if devices:
            target = torch.device(devices[0]).type == self.device.type
        elif like is not None:
            target = like
        elif func is Tensor.cpu:
            target = False
        elif func not in _FREE:
            self._check(func, args, found)
            target = any(isinstance(x, Remote) for x in found)
        args, kwargs = tree_map(lambda x: _device(local(x)), (args, kwargs))
        out = func(*args, **kwargs)
        if (
            target
            and self.device == MPS
            and any(x.dtype == torch.float64 for x in tree_iter(out) if isinstance(x, Tensor))
        ):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return tree_map(remote if target else local, out)

    def _check(self, func: Any, args: Any, found: list[Tensor]) -> None:
        # Scalars of the CPU may meet anything; indices of the CPU may select from anything.
        sized = [x for x in (found[:1] if func in _INDEXING and not isinstance(args[-1], Tensor) else found) if x.ndim]
        places = {isinstance(x, Remote) for x in sized}
        if len(places) > 1:
            name = getattr(func, "__name__", str(func))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {self.device} and cpu")


def _device(x: Any) -> Any:
    """The CPU for the pretended device; anything else as it is."""
    return "cpu" if _names_device(x) else x


def _names_device(x: Any) -> bool:
    return isinstance(x, (torch.device, str)) and str(x).split(":")[0] in ("cpu", "cuda", "mps")
