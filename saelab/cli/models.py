"""The options of the commands that run a language model, and the model that they mean."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch.distributed as dist

from saelab.cli.console import console
from saelab.data.cache import ActivationCache
from saelab.distributed import launched
from saelab.errors import UserError
from saelab.lm.fingerprint import tokenizer_hash
from saelab.lm.record import ModelRecord, load_recorded
from saelab.lm.tokens import vocabulary


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
    """Spread the language model over devices, host memory (cpu) and disk: auto, balanced or sequential, or what is
    where, `rest=cuda:0,model.layers.20-31=disk`, or a .json file of it (needs accelerate)."""
    tensor_parallel: bool = False
    """Divide the language model over the processes of torchrun, by the plan that transformers has for it."""
    any_weights: bool = False
    """Accept a model whose weights are not those that the activations come from, such as a fine-tuned one."""


def complete_tokens(cache: ActivationCache, model: Any) -> None:
    """Let the model's tokenizer tell the bytes of tokens, which caches of 0.1.0 do not hold; else say what is missing.

    Nothing happens for a cache that holds them, and for one that has no token that is a part of a character.
    """
    known = cache.vocabulary
    if known.parts or not any("\ufffd" in text for text in known):
        return
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None and tokenizer_hash(tokenizer) == cache.manifest.tokenizer_hash:
        cache.vocabulary = vocabulary(tokenizer)
        return
    console.print(
        f"note: {cache.path} does not hold the bytes of its tokens, and there is no model whose tokenizer does: "
        "characters of several tokens are shown as \ufffd; harvest again to have them",
        markup=False,
        soft_wrap=True,
    )


def open_model(options: ModelOptions, record: ModelRecord, what: str, *, plain: bool = False) -> Any:
    """The model that the options ask for, or the recorded one; UserError for other weights than the recorded ones."""
    if options.tensor_parallel and launched() and not dist.is_initialized():
        raise UserError("this command does not divide a model over processes; spread it with --device-map")
    console.print(f"loading {options.model or record.name or 'the language model'}", markup=False)
    return load_recorded(
        record,
        what,
        name=options.model,
        device=options.device,
        dtype=options.model_dtype,
        revision=options.revision,
        device_map=options.device_map,
        tensor_parallel=options.tensor_parallel,
        any_weights=options.any_weights,
        plain=plain,
    )
