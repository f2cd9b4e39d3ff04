"""Control vectors for llama.cpp: the layout that ``--control-vector`` reads and repeng writes.

A GGUF file of architecture ``controlvector`` with one float32 tensor ``direction.N`` per layer, which llama.cpp adds
to the residual stream after block ``N``. Block 0 has no slot in that layout.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.files import replace
from saelab.lm.hook_names import layer_of
from saelab.steering.operations import Add
from saelab.steering.recipe.recipe import Recipe

# Hugging Face class -> what llama.cpp calls the architecture; it is a hint, not checked by llama.cpp.
_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_ARCHITECTURES |= {"Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "GPT2LMHeadModel": "gpt2"}
_ARCHITECTURES |= {"MistralForCausalLM": "llama", "GPTNeoXForCausalLM": "gptneox", "Phi3ForCausalLM": "phi3"}


def export_gguf(recipe: Recipe, path: Path | str) -> Path:
    """Write the recipe's vectors, strengths folded in: apply with scale 1. Several at one layer are summed.

    Raises UserError for what the layout cannot hold: operations other than Add, chosen tokens, hook points other than a
    block's output, block 0.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise UserError("writing GGUF needs the gguf package: pip install gguf") from error
    path = Path(path)
    layers: dict[int, Tensor] = {}
    for intervention in recipe.interventions:
        if not isinstance(intervention, Add):
            raise UserError(f"a GGUF control vector can only add; {type(intervention).__name__} stays in saelab")
        if intervention.where != "all" or intervention.skip_first or intervention.when or intervention.schedule:
            raise UserError(
                "a GGUF control vector acts on every token alike; use where='all' without skip_first, condition and "
                "schedule"
            )
        layer = _layer(intervention.hook_name)
        shift = intervention.vector.direction.float() * intervention.length
        layers[layer] = layers.get(layer, torch.zeros_like(shift)) + shift
    if not layers:
        raise UserError("the recipe holds no vector to export; give it an Add")
    hint = _ARCHITECTURES.get(recipe.model.architecture, recipe.model.architecture)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        writer = GGUFWriter(str(partial), "controlvector")
        writer.add_string("controlvector.model_hint", hint)
        writer.add_uint32("controlvector.layer_count", recipe.model.n_layers)
        for layer in sorted(layers):
            writer.add_tensor(f"direction.{layer}", layers[layer].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    replace(path, write)
    return path


def _layer(hook_name: str) -> int:
    layer = layer_of(hook_name)
    is_output = hook_name.endswith((f".{layer}.hook_resid_post", f".{layer}.hook_out", f".{layer}"))
    if layer is None or not is_output:
        raise UserError(f"a GGUF control vector acts on a block's output, not at {hook_name}")
    if layer == 0:
        raise UserError("the GGUF layout has no slot for block 0; steer at a later block")
    return layer
