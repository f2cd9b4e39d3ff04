"""Device maps: which part of a language model is on which device, in host memory, or on disk.

transformers and accelerate do the placing. What is written here reads a map that a user states, checks it against the
model before any weight is read, and completes it: accelerate wants every part named once, and none inside another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from saelab.devices import existing_device
from saelab.errors import UserError, damaged, near_matches

Automatic = Literal["auto", "balanced", "balanced_low_0", "sequential"]
DeviceMap = str | Mapping[str, Any]
REST = "rest"  # the name of everything that a map does not name
_RANGE = re.compile(r"(\d+)-(\d+)")
_FORM = "write it as rest=cuda:0,model.layers.8-15=cpu, or name a .json file or auto"


def read_map(text: DeviceMap) -> str | dict[str, Any]:
    """A map as the option states it: ``auto``, ``balanced``, ``balanced_low_0`` or ``sequential``; the path of a .json
    file; one device for the whole model; or places and devices, ``rest=cuda:0,model.layers.8-15=disk``.

    UserError for anything else.
    """
    if not isinstance(text, str):
        return dict(text)
    if text in get_args(Automatic):
        return text
    if text.endswith(".json"):
        path = Path(text)
        if not path.is_file():
            raise UserError(f"device map {text} does not exist; {_FORM}")
        with damaged(path, "write a JSON object of module paths and devices"):
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("it holds no object")
        return content
    if "=" not in text:
        return {"": text}
    found: dict[str, Any] = {}
    for part in text.split(","):
        place, sign, device = part.strip().rpartition("=")
        if not sign or not device:
            raise UserError(f"device map {text!r}: {part!r} is no place and device; {_FORM}")
        if place in found:
            raise UserError(f"device map {text!r} names {place} twice; name it once")
        found[place] = device
    return found


def complete(stated: Mapping[str, Any], model: nn.Module, what: str) -> dict[str, str | int | torch.device]:
    """A stated map with every part of ``model`` named once, as accelerate wants it; ``model`` may be empty.

    UserError for a module that the model lacks, a part that is left out, a device that is not here, and a block whose
    parts would compute on different devices.
    """
    modules = dict(model.named_modules())
    wanted = {}
    for place, device in stated.items():
        for name in _names(place):
            if name not in modules:
                raise UserError(f"device map: {what} has no module {name!r}; {near_matches(name, modules)}")
            wanted[name] = device
    devices = {name: _device(device) for name, device in wanted.items()}
    _check_blocks(devices, model)
    found: dict[str, str | int | torch.device] = {}

    def visit(path: str, module: nn.Module, device: Any) -> None:
        device = devices.get(path, device)
        below = f"{path}." if path else ""
        if not any(name.startswith(below) and name != path for name in devices):
            if device is None and next(module.parameters(), None) is None and next(module.buffers(), None) is None:
                return
            if device is None:
                raise UserError(
                    f"the device map says nothing about {path} of {what}; add {path}=DEVICE or {REST}=DEVICE"
                )
            found[path] = device
            return
        for leaf, _ in [*module._parameters.items(), *module._buffers.items()]:
            if device is None:
                raise UserError(f"the device map says nothing about {below}{leaf} of {what}; add {REST}=DEVICE")
            found[f"{below}{leaf}"] = device
        for name, child in module.named_children():
            visit(f"{below}{name}", child, device)

    visit("", model, None)
    used = set(found.values())
    return {"": used.pop()} if len(used) == 1 else found


def check_divisible(model: nn.Module, what: str) -> None:
    """UserError for a model of which transformers does not say what may not be divided, for an automatic map."""
    if not getattr(model, "_no_split_modules", None):
        raise UserError(
            f"{what} ({type(model).__name__}) does not say where it may be divided, so that no device map can be made; "
            f"state one ({_FORM}), or leave it out"
        )


def _names(place: str) -> list[str]:
    """The paths that a stated place means: a range of layers stands for each of them."""
    place = "" if place == REST else place
    match = _RANGE.search(place)
    if match is None:
        return [place]
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise UserError(f"device map: {match[0]} in {place} is no range of layers; write the smaller number first")
    return [f"{place[: match.start()]}{number}{place[match.end() :]}" for number in range(first, last + 1)]


def _device(device: Any) -> str | torch.device:
    """``cpu``, ``disk``, or a GPU that is here; accelerate's number of a GPU is one too."""
    if isinstance(device, int) or (isinstance(device, str) and device.isdigit()):
        device = f"cuda:{device}"
    if device in ("cpu", "disk"):
        return device
    try:
        return existing_device(device)
    except UserError as error:
        raise UserError(f"device map: {error}, disk") from error


def _check_blocks(devices: Mapping[str, str | torch.device], model: nn.Module) -> None:
    """Refuse a map that divides a block which transformers says must not be: what its parts add up would meet on
    different devices. Parts in host memory or on disk compute where the rest does."""
    main = next((device for device in devices.values() if isinstance(device, torch.device)), "cpu")
    whole = set(getattr(model, "_no_split_modules", None) or ())
    for path, module in model.named_modules():
        if type(module).__name__ not in whole:
            continue
        inside = {name: device for name, device in devices.items() if name == path or name.startswith(f"{path}.")}
        outer = max((name for name in devices if not name or f"{path}.".startswith(f"{name}.")), key=len, default=None)
        used = {*inside.values()} | ({devices[outer]} if outer is not None else set())
        if inside and len({device if isinstance(device, torch.device) else main for device in used}) > 1:
            raise UserError(f"the device map divides {path}, whose parts must compute on one device; name it whole")
