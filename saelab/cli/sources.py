"""What the commands that harvest have in common: the language model, the text, and where the model runs."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from saelab.cli.console import SPINNER, console


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Which model reads which text."""

    model: str = "smollm2"
    """Language model: `smollm2`, `gemma3-270m`, a hub id, or a local folder (of a PEFT adapter too)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    text: tuple[str, ...] = ("wiki-sample",)
    """Text, one or more: `wiki-sample`, a .txt, .jsonl or .parquet file (also .gz, .bz2, .xz, .zst), a folder of them,
    or a dataset's hub id."""
    text_split: str = "train"
    """Split of a dataset."""
    text_column: str | None = None
    """Field with the text or the chat; by default `text`, else `messages`, else the only text field."""
    model_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Precision the model runs in; auto is that of its checkpoint on a CUDA GPU, and float32 elsewhere. The cache
    records it, and later commands use it."""
    device_map: str | None = None
    """Spread the model over devices, host memory (cpu) and disk: auto, balanced or sequential, or what is where,
    `rest=cuda:0,model.layers.20-31=disk`, or a .json file of it (needs accelerate)."""


def running_dtype(asked: str, device: Any) -> str:
    """The precision to load the model in: on a GPU, ``auto`` is the checkpoint's own, in which it was trained or saved.

    CPUs compute 16 bits more slowly than 32, where they do not emulate them.
    """
    return asked if asked != "auto" or device.type == "cuda" else "float32"


def open_source(options: Any, device: Any, **how: Any) -> tuple[Any, Any]:
    """The model of :class:`SourceOptions` on ``device``, and the text; ``how`` goes to :func:`saelab.load_model`."""
    from saelab.data.text import open_text
    from saelab.lm import load_model

    source = open_text(options.text, split=options.text_split, column=options.text_column)
    with console.status(f"loading {options.model} (converted on first use)", spinner=SPINNER):
        dtype = running_dtype(options.model_dtype, device)
        model = load_model(
            options.model, dtype=dtype, device=device, device_map=options.device_map, revision=options.revision, **how
        )
    return model, source
