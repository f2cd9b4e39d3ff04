"""The weights of a model that is spread over devices, host memory and disk, or over processes.

accelerate leaves an empty tensor on the device ``meta`` in place of a weight that it keeps elsewhere, and puts the
weight there for each pass. Tensor parallelism leaves each process a part. Everything that reads weights asks here.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.files import cache_home
from saelab.lm.structure import inside, underlying


def whole(root: nn.Module, path: str, leaf: str, tensor: Tensor) -> Tensor:
    """The values of a parameter or buffer ``leaf`` of the module at ``path`` of ``root``, ``tensor`` as it is there.

    A weight that was offloaded is read from where it is kept. One that is divided over processes is put together,
    which all of them must ask for. UserError for an empty tensor that nothing says the values of.
    """
    if (put_together := _put_together(tensor)) is not None:
        return put_together()
    if not tensor.is_meta:
        return tensor
    parts = path.split(".") if path else []
    for n in range(len(parts), -1, -1):  # a hook above may keep the weights of everything below it
        found = _kept(root.get_submodule(".".join(parts[:n])), ".".join([*parts[n:], leaf]))
        if found is not None:
            return found
    raise UserError(f"{'.'.join([*parts, leaf])} of the model has no values; load the model again")


def weight_of(model: nn.Module, module: nn.Module) -> Tensor:
    """The ``weight`` of a module of ``model``, whole, wherever it is."""
    module = inside(module)
    root, tensor = underlying(model), module.weight
    assert isinstance(tensor, Tensor)
    if not tensor.is_meta:
        return whole(root, "", "weight", tensor)
    path = next(path for path, found in root.named_modules() if found is module)
    return whole(root, path, "weight", tensor)


def whole_copy(model: nn.Module, module: nn.Module) -> nn.Module:
    """A copy of a module of ``model`` with all its weights, in float32 on the CPU, without hooks of accelerate."""
    if not any(_is_elsewhere(tensor) for tensor in module.parameters()):
        return copy.deepcopy(module).float().cpu()
    root = underlying(model)
    path = next(path for path, found in root.named_modules() if found is module)
    made = copy.deepcopy(module)
    for below, part in made.named_modules():
        part.__dict__.pop("_hf_hook", None)
        if "_old_forward" in part.__dict__:
            part.__dict__.pop("_old_forward")
            part.__dict__.pop("forward", None)
        for leaf, tensor in part._parameters.items():
            if tensor is not None:
                values = whole(root, f"{path}.{below}".strip("."), leaf, tensor)
                part._parameters[leaf] = nn.Parameter(values.detach().float().cpu(), requires_grad=False)
    return made.float().cpu()


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: the device of its first parameter, or on which that is used if it is kept
    elsewhere."""
    for module in underlying(model).modules():
        for tensor in module._parameters.values():
            if tensor is None:
                continue
            if not tensor.is_meta:
                return tensor.device
            used = next((hook.execution_device for hook in _hooks(module) if hook.execution_device is not None), None)
            if used is not None:
                return torch.device("cuda", used) if isinstance(used, int) else torch.device(used)
    return torch.device("cpu")


def is_spread(model: nn.Module) -> bool:
    """Whether parts of a model are on different devices, offloaded, or with other processes."""
    parameters = list(underlying(model).parameters())
    return len({p.device for p in parameters}) > 1 or any(map(_is_elsewhere, parameters))


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of a model are not where they are used, so that they cannot be changed."""
    return any(map(_is_elsewhere, underlying(model).parameters()))


def offload_folder() -> str:
    """A new folder for weights that must be kept on disk and that the checkpoint does not hold as they are used, such
    as those of experts; removed when the process ends."""
    cache_home().mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="offloaded-", dir=cache_home())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tied_names(model: nn.Module) -> dict[str, str]:
    """For each parameter that is another one too, the name of that one, as transformers knows them.

    Offloaded, the two are two empty tensors.
    """
    return dict(getattr(underlying(model), "all_tied_weights_keys", None) or {})


def _is_elsewhere(tensor: Tensor) -> bool:
    return tensor.is_meta or _put_together(tensor) is not None


def _put_together(tensor: Tensor) -> Callable[[], Tensor] | None:
    """What makes a DTensor whole; None for a tensor of another class. Importing that class takes a second."""
    return getattr(tensor, "full_tensor", None)


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module that know devices."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", (hook,)) if hasattr(one, "execution_device")]


def _kept(module: nn.Module, name: str) -> Tensor | None:
    for hook in _hooks(module):
        kept = getattr(hook, "weights_map", None)
        if isinstance(kept, Mapping):
            try:
                return kept[name]
            except KeyError:
                continue
    return None
