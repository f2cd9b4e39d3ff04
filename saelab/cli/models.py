"""The options of the commands that run a language model, and the model that they mean."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from saelab.cli.console import console
from saelab.lm.record import ModelRecord, load_recorded


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which language model, and how it is loaded."""

    model: str | None = None
    """Language model: `smollm2`, `gemma3-270m`, a hub id, or a local folder (of a PEFT adapter too); by default the one
    that the activations come from."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; by default the commit that the activations come from."""
    model_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision the model runs in; by default the one in which it was harvested, float32 where that is not recorded."""
    device: str = "auto"
    """Where the SAE and the language model run: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    device_map: str | None = None
    """Spread the language model over several devices: auto, balanced, sequential (needs accelerate)."""
    any_weights: bool = False
    """Accept a model whose weights are not those that the activations come from, such as a fine-tuned one."""


def open_model(options: ModelOptions, record: ModelRecord, what: str, *, plain: bool = False) -> Any:
    """The model that the options ask for, or the recorded one; UserError for other weights than the recorded ones."""
    console.print(f"loading {options.model or record.name or 'the language model'}", markup=False)
    return load_recorded(
        record,
        what,
        name=options.model,
        device=options.device,
        dtype=options.model_dtype,
        revision=options.revision,
        device_map=options.device_map,
        any_weights=options.any_weights,
        plain=plain,
    )
