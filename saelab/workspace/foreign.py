"""SAEs of other tools in the folder: recognised by their files, read once for what they are."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saelab.errors import UserError
from saelab.layout import WEIGHTS

# The file that tells: SAELens, sparsify, dictionary_learning, Gemma Scope (twice), Llama Scope.
TELLING = (
    WEIGHTS,
    "sae.safetensors",
    "ae.pt",
    "params.npz",
    "params.safetensors",
    "hyperparams.json",
)


def looks_foreign(files: Iterable[str]) -> bool:
    """Whether a folder with these files may hold another tool's SAE."""
    return not set(TELLING).isdisjoint(files)


def configuration(folder: Path) -> dict[str, Any]:
    """What ``cfg.json`` of a run of ours would say of an SAE of another tool; ``error`` where it cannot be read."""
    stamp = tuple(path.stat().st_mtime_ns for name in TELLING if (path := folder / name).is_file())
    return dict(_read(folder, stamp))


@functools.lru_cache(maxsize=256)
def _read(folder: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    from saelab.interop import read

    try:
        found = read(folder)
    except UserError as error:
        return {"error": str(error)}
    metadata = {name: value for name, value in found.metadata.items() if value is not None}
    where = metadata.get("hf_hook_name", "")
    if "hook_name" not in metadata and "." in where:
        metadata["hook_name"] = where  # a module path of the model, as sparsify names its folders
    # The weights are let go of: a folder of large SAEs must not fill the memory by being listed.
    return {
        "architecture": found.architecture,
        "format": found.format,
        "d_in": found.d_in,
        "d_sae": found.d_sae,
        "k": found.k,
        "metadata": metadata,
    }
