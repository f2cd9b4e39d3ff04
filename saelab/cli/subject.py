"""What ``index`` and ``evaluate`` work on: an SAE, whoever trained it, and activations of its own kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.interop.detection import is_ours, load_with_metadata
from saelab.sae import SAE


def open_subject(path: Path, cache_folder: Path) -> tuple[SAE, ActivationCache, Path]:
    """The SAE at ``path`` in eval mode, the cache, and the folder that results are written into.

    UserError where the cache holds another model or hook point than the SAE was trained on; another text is fine.
    """
    (sae, metadata, folder, _), cache = load_with_metadata(path), ActivationCache(cache_folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file, and results need a folder: `saelab convert {folder} NEW --to saelens` makes one"
        )
    # Other tools name models in ways of their own, "gpt2-small" for "gpt2".
    known = metadata if is_ours(folder) else {"hook_name": metadata.get("hook_name")}
    check_provenance(known, cache, folder)
    return sae, cache, folder


def check_provenance(metadata: dict[str, Any], cache: ActivationCache, folder: Path) -> None:
    """Refuse a cache that the SAE's metadata contradict."""
    for key, have in (("model_name", cache.manifest.model), ("hook_name", cache.hook_name)):
        want = metadata.get(key)
        if want and have and want != have:
            raise UserError(f"{folder} was trained on {key}={want}, {cache.path} holds {have}; give it its own kind")
