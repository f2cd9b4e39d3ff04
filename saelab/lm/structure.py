"""The parts of a Hugging Face model, found by its structure: blocks, the sublayers in them, and their linear maps.

Everything here reads module names, shapes and the configuration, on plain models and on the model inside a
TransformerLens bridge. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from saelab.errors import UserError


class Reached(Exception):
    """Raised by a hook at the last place that is read, because the rest of the model is not needed."""


WRAPPED = "_original_component"  # the name of the model's own module in a component of a bridge
_BLOCK_LISTS = ("layers", "h", "blocks", "block", "layer")
_OTHER_TOWERS = ("vision", "visual", "audio", "image", "encoder", "mtp")
# The names that a sublayer has in the families of models.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
# Names that one family gives to either of them, or to neither: what such a module holds decides.
_EITHER_ATTENTION, _EITHER_MLP = ("temporal_block", "mixer"), ("mlp_block", "mixer")
_STATE_SPACES = ("mamba", "ssm")
_EXPERTS = ("experts", "router", "gate", "shared_expert", "shared_experts")
# The linear maps of a sublayer, in the families of models; of those that a module has, the first counts.
_LAST = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo", "Wo")
_FIRST = ("gate_proj", "w1", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "up_proj")
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")
_SINGLE = {"q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value")}
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj")


def opened(model: nn.Module) -> nn.Module:
    """The bridge or the plain model inside what ``torch.compile`` or PEFT made of it; any other model itself.

    UserError for an adapter that puts tokens in front of the text: positions would not be those of the text.
    """
    model = model._modules.get("_orig_mod") or model  # torch.compile
    made: Any = model
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError(
            f"this {type(model).__name__} puts tokens of its own in front of the text; saelab takes adapters that "
            "change weights, such as LoRA"
        )
    return opened(made.get_base_model())  # with the adapter in its layers


def underlying(model: nn.Module) -> nn.Module:
    """The module whose ``forward`` maps tokens to logits: a bridge's inner model, or the plain model itself."""
    model = opened(model)
    return getattr(model, "original_model", model)


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` has compiled a model, or a part of it."""
    for module in {id(m): m for m in (model, *underlying(model).modules())}.values():
        compiled = getattr(module, "_compiled_call_impl", None) or module.__dict__.get("_compiled_call")
        if compiled or "_orig_mod" in module._modules or hasattr(module.forward, "_torchdynamo_orig_callable"):
            return True
    return False


def inside(module: nn.Module) -> nn.Module:
    """The model's own module inside a component of a bridge; any other module itself."""
    while WRAPPED in module._modules:
        module = module.get_submodule(WRAPPED)
    return module


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its Hugging Face path, parents first; on a bridge the component that stands in its place."""

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        yield path, module
        for name, child in inside(module)._modules.items():
            if child is not None:
                yield from visit(child, f"{path}.{name}".lstrip("."))

    yield from visit(underlying(model), "")


def children(module: nn.Module) -> dict[str, nn.Module]:
    """The modules directly inside, by their Hugging Face names."""
    return {name: child for name, child in inside(module)._modules.items() if child is not None}


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also where it is a part of a multimodal model; None for none."""
    config: Any = getattr(underlying(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def width(model: nn.Module) -> int | None:
    """``d_model``, if the model's configuration has it."""
    for config in (getattr(model, "cfg", None), text_config(model)):
        for name in ("d_model", "hidden_size", "n_embd"):
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
    return None


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the transformer blocks of the language model."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in modules(model):
        parts = path.split(".")
        is_inner = any(path.startswith(f"{outer}.") for outer, _ in found)
        if not isinstance(module, nn.ModuleList) or parts[-1] not in _BLOCK_LISTS or is_inner:
            continue
        if not any(tower in part for part in parts for tower in _OTHER_TOWERS):
            found.append((path, module))
    if not found:
        raise UserError(f"{type(underlying(model)).__name__} has no list of transformer blocks that saelab knows")
    configured = getattr(text_config(model), "num_hidden_layers", None)
    return max(found, key=lambda item: (len(item[1]) == configured, len(item[1])))


def attention(block: nn.Module) -> str | None:
    """The path of the attention in a block; None where it has none."""
    own = children(block)
    name = next((name for name in _ATTENTION if name in own), None)
    if name is not None and "attention" in children(own[name]):
        return f"{name}.attention"  # GPT-Neo chooses between two kinds inside
    return name or next((n for n in _EITHER_ATTENTION if n in own and "q_proj" in children(own[n])), None)


def mlp(block: nn.Module) -> str | None:
    """The path of the MLP in a block, ``""`` where its linear maps belong to the block itself; None for none."""
    own = children(block)
    name = next((name for name in _MLP if name in own), None)
    if name is None and "fc1" in own and "fc2" in own:
        return ""
    return name or next((n for n in _EITHER_MLP if n in own and {"up_proj", "down_proj"} <= {*children(own[n])}), None)


def state_space(block: nn.Module) -> str | None:
    """The path of a state space model that stands beside or in place of the attention in a block; None for none."""
    return next((name for name in _STATE_SPACES if name in children(block)), None)


def child(module: nn.Module, path: str) -> nn.Module:
    """The module at a Hugging Face path below ``module``."""
    for name in path.split(".") if path else ():
        module = children(module)[name]
    return module


def is_mixture(block: nn.Module) -> bool:
    """Whether the block's MLP is a mixture of experts."""
    path = mlp(block)
    return path is not None and any(name in _EXPERTS for name in children(child(block, path)))


def last_map(module: nn.Module) -> str | None:
    """The name of the linear map that ends a sublayer; None where it has none of its own, or several."""
    found = [name for name in _LAST if name in children(module)]
    return found[0] if len(found) == 1 else None


def first_map(module: nn.Module) -> tuple[str, str] | None:
    """Name and side at which an MLP shows what enters its nonlinearity (of a gated MLP, the gate)."""
    own = children(module)
    name = next((name for name in _FIRST if name in own), None)
    if name is not None:
        return name, "out"
    # A fused gate is split inside, and its half enters the nonlinearity.
    name = next((name for name in _ACTIVATIONS if name in own), None)
    return None if name is None else (name, "in")


def multiplier(model: nn.Module, point: str) -> float:
    """What a model multiplies the output of a linear map by, before it is what ``point`` names (Falcon-H1)."""
    config: Any = text_config(model)
    if point == "attn.hook_k":
        return float(getattr(config, "key_multiplier", None) or 1.0)
    if point == "mlp.hook_pre":
        return float((getattr(config, "mlp_multipliers", None) or [1.0])[0])
    return 1.0


def projection(model: nn.Module, module: nn.Module, which: str) -> tuple[str, tuple[int, ...] | None] | None:
    """The linear map that makes the queries, keys or values (``which``: q, k, v) of an attention, and the columns of
    its output that hold them (None: all); None where the layout is not known."""
    if not getattr(text_config(model), "num_attention_heads", None):
        return None  # RWKV has no heads
    heads, kv_heads, d_head = _head_sizes(model, inside(module))
    wanted = (heads if which == "q" else kv_heads) * d_head
    own = children(module)
    name = next((name for name in _SINGLE[which] if name in own), None)
    if name is not None:
        return name, (None if _out_features(own[name]) == wanted else ())
    name = next((name for name in _FUSED if name in own), None)
    if name is None:
        return None
    columns = _columns(model, "qkv".index(which), _out_features(own[name]), (heads, kv_heads, d_head))
    return None if columns is None else (name, columns)


def _head_sizes(model: nn.Module, module: nn.Module) -> tuple[int, int, int]:
    config: Any = text_config(model)
    heads = int(config.num_attention_heads)
    d_head = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    if config.model_type == "falcon":
        kv_heads = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    elif config.model_type == "gpt_bigcode":
        kv_heads = 1 if config.multi_query else heads
    elif config.model_type == "gpt_neox":
        kv_heads = heads
    return heads, int(kv_heads or heads), int(d_head)


def _out_features(module: nn.Module) -> int | None:
    weight = getattr(inside(module), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    return weight.shape[1 if type(inside(module)).__name__ == "Conv1D" else 0]


def _columns(model: nn.Module, which: int, total: int | None, sizes: tuple[int, int, int]) -> tuple[int, ...] | None:
    """Where queries (0), keys (1) or values (2) lie in the output of one map for all three."""
    heads, kv_heads, d_head = sizes
    config: Any = text_config(model)
    kind = config.model_type
    widths = (heads * d_head, kv_heads * d_head, kv_heads * d_head)
    if total != sum(widths):
        return None
    if kind == "codegen":  # four parts, one for each device it was trained on: queries, values, keys
        part, order = widths[0] // 4, (0, 2, 1)[which]
        return tuple(3 * part * i + part * order + j for i in range(4) for j in range(part))
    by_head = kind in ("gpt_neox", "bloom", "persimmon") or (kind == "gpt_bigcode" and not config.multi_query)
    by_head |= kind == "falcon" and not config.new_decoder_architecture and not config.multi_query
    if by_head:
        return tuple(d_head * (3 * head + which) + j for head in range(heads) for j in range(d_head))
    if kind == "falcon" and config.new_decoder_architecture:  # each key head follows the queries that share it
        shared = heads // kv_heads
        slots = [range(shared), [shared], [shared + 1]][which]
        return tuple(
            d_head * ((shared + 2) * group + slot) + j
            for group in range(kv_heads)
            for slot in slots
            for j in range(d_head)
        )
    if kind in ("gpt2", "openai-gpt", "mpt", "phi3", "gpt_bigcode", "falcon"):
        start = sum(widths[:which])
        return tuple(range(start, start + widths[which]))
    return None
