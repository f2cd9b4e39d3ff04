"""Read untrusted files: safetensors, restricted torch files and npz; no code runs, and memory is bounded."""

from __future__ import annotations

import functools
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saelab.errors import UserError, first_line
from saelab.interop import kind

MAX_NUMBERS = 2**33  # tensors of one SAE: 32 GiB in float32, above any published SAE
MAX_JSON = 16 * 2**20  # bytes
AGAIN = "get the file again"
SHARDS = ".index.json"  # behind the name of a safetensors file that is split: which file holds which tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size."""
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path} has {path.stat().st_size} bytes, too many for a configuration")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({first_line(error)}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def flag(config: Mapping[str, Any], name: str, default: bool, path: Path) -> bool:
    """A setting that is true or false; null counts as false. UserError for text such as "false"."""
    value = config.get(name, default)
    if value not in (True, False, None):
        raise UserError(f"{path}: {name}={value!r} is neither true nor false; correct it")
    return bool(value)


def above_zero(threshold: Tensor) -> Tensor:
    """The threshold of ``ReLU(u) * 1[u > threshold]`` for a JumpReLU without a ReLU of its own."""
    return threshold.clamp_min(0)


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors, ``.npz`` or torch file; a torch file may hold plain values beside them.

    Torch files are read with ``weights_only=True``: one that would run code is refused. A safetensors file may be split
    into several, with an index beside them.
    """
    if path.suffix == ".safetensors" and not path.is_file() and has_tensors(path):
        return _shards(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; name a checkpoint")
    reader = {".safetensors": _safetensors, ".npz": _npz}.get(path.suffix, _torch)
    return reader(path)


def has_tensors(path: Path) -> bool:
    """Whether there is a file at ``path``, or the index of a safetensors file of that name that is split."""
    return path.is_file() or path.with_name(path.name + SHARDS).is_file()


def split_files(name: str) -> tuple[str, ...]:
    """The patterns of all files that the safetensors file ``name`` may consist of."""
    return name, f"{name}{SHARDS}", f"{name.removesuffix('.safetensors')}-*-of-*.safetensors"


def checked(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], origin: Path) -> dict[str, Any]:
    """The named tensors in float32, after checking that each is there, has its shape and is finite.

    Raises UserError for the tensors of a transcoder or crosscoder, too.
    """
    kind.check_tensors(origin, tensors, shapes)
    out = {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{origin} has no tensor {name!r}; it holds {', '.join(map(str, list(tensors)[:8]))}")
        if tuple(tensor.shape) != shape:
            kind.check_decoder(origin, name, tensors, shape)
            raise UserError(f"{origin}: {name} has shape {tuple(tensor.shape)} where {shape} is expected")
        if not tensor.is_floating_point():
            raise UserError(f"{origin}: {name} has dtype {tensor.dtype}, expected floating point")
        out[name] = tensor.float()
        if not out[name].isfinite().all():
            raise UserError(f"{origin}: {name} has NaN or infinite entries")
    return out


def matrix_shape(tensors: Mapping[str, Any], name: str, origin: Path) -> tuple[int, int]:
    """The two sizes of the matrix ``name``."""
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        kind.check_tensors(origin, tensors)
        raise UserError(f"{origin} has no matrix {name!r}; it holds {', '.join(map(str, list(tensors)[:8]))}")
    return tensor.shape[0], tensor.shape[1]


def read_linear(raw: Mapping[str, Any], origin: Path, transcodes: bool = False) -> dict[str, Any]:
    """``encoder.*`` and ``decoder.*`` of two ``nn.Linear`` as canonical tensors."""
    d_sae, d_in = matrix_shape(raw, "encoder.weight", origin)
    d_out = matrix_shape(raw, "decoder.weight", origin)[0] if transcodes else d_in
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_out, d_sae),
        "decoder.bias": (d_out,),
    }
    tensors = checked(raw, shapes, origin)
    return {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["decoder.bias"],
    }


def tensor_names(path: Path) -> set[str]:
    """Keys in a torch file; empty where the name is not one of a torch file.

    Raises UserError for a torch file that cannot be read. Asked again for an unchanged file, the answer is kept.
    """
    if path.suffix not in {".pt", ".pth", ".bin"}:
        return set()
    stat = path.stat()
    return set(_tensor_names(path, stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=4096)
def _tensor_names(path: Path, modified: int, size: int) -> frozenset[str]:
    return frozenset(str(name) for name in read_tensors(path))


def _safetensors_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, 100 * 2**20):
            raise UserError(f"{path} is not a safetensors file, or it is truncated; {AGAIN}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} has a damaged safetensors header; {AGAIN}") from error
    return header if isinstance(header, dict) else {}


def _safetensors(path: Path) -> dict[str, Any]:
    _safetensors_header(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {AGAIN}") from error


def _shards(path: Path) -> dict[str, Any]:
    index = path.with_name(path.name + SHARDS)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} does not say which file holds which tensor; {AGAIN}")
    tensors: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is no safetensors file beside it; {AGAIN}")
        if not (path.parent / name).is_file():
            raise UserError(f"{path.parent / name} is missing, which holds a part of {path.name}; {AGAIN}")
        held = _safetensors(path.parent / name)
        tensors |= {key: held[key] for key, place in places.items() if place == name and key in held}
    if missing := sorted(places.keys() - tensors.keys()):
        raise UserError(f"{index} promises {missing[0]!r}, which no file holds; {AGAIN}")
    return tensors


def _npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            # A small archive can unpack to terabytes: look at the declared sizes first.
            total = sum(entry.file_size for entry in archive.infolist())
        if total > min(4 * MAX_NUMBERS, 1000 * path.stat().st_size):
            raise UserError(f"{path} would unpack to {total:,} bytes from {path.stat().st_size:,}; refused")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, OSError, EOFError, TypeError, KeyError) as error:
        # RuntimeError: a wrong bit declares an archive's entry encrypted, or packed in an unknown way.
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a readable npz file ({first_line(error)}); {AGAIN}") from error


def _torch(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} would run code when loaded; refused (ask its author for safetensors)") from error
    except Exception as error:  # the restricted unpickler fails in a dozen ways on bytes that are no torch file
        raise UserError(f"{path} is not a readable torch file ({first_line(error)}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    numbers = sum(value.numel() for value in content.values() if isinstance(value, Tensor))
    if numbers > MAX_NUMBERS:
        raise UserError(f"{path} holds {numbers:,} numbers, more than any SAE; refused")
    return content
