"""Tiny random language models, one of each family: 2 to 4 blocks of width 32 with a byte-level tokenizer.

``FAMILIES`` gives the class and the configuration of each family; ``save`` writes one into a folder as any published
checkpoint is laid out. Nothing in them is degenerate: norms have weights and biases that differ, biases are not zero,
and matrices are scaled so that each sublayer matters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests import tiny_lm

NAMES = frozenset(dir(transformers))  # of classes; to ask for one imports its module, a fifth of collecting all tests
VOCABULARY, WIDTH, BLOCKS, HEADS, CONTEXT = 320, 32, 3, 4, 64
# Parameters with a meaning that a random value would destroy: decay rates and step sizes of state spaces.
_LEFT_ALONE = ("A_log", "dt_bias", "dt_proj.bias", ".D", "time_decay", "time_first", "rg_lru", "linear_attn")


Read = Callable[[Tensor], Tensor]
Places = dict[str, tuple[str, str, Read] | None]


@dataclass(frozen=True)
class Family:
    """One kind of model: its class, the settings of its configuration, and where its activations are.

    ``places`` tells for each point of a block the module below the block, its side, and what is to be made of the
    tensor there; None where a model has no such activations.
    """

    model: str  # class of transformers
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    places: Places = field(default_factory=dict)
    blocks: str = "model.layers"

    @property
    def known(self) -> bool:
        """Whether the installed transformers has it."""
        return {self.model, self.config} <= NAMES

    def build(self, seed: int = 0) -> Any:
        """The model, with random weights, in evaluation mode."""
        config = getattr(transformers, self.config)(**self.settings)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.bos_token_id, part.eos_token_id, part.pad_token_id = 0, 1, 1
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(config).eval()
        _randomise(model, seed)
        return model


def _randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in _LEFT_ALONE):
                continue
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise(parameter))
            elif any(part in name for part in ("embed", "wte", "wpe", "embd")):
                parameter.copy_(noise(parameter))
            else:
                parameter.copy_(noise(parameter) / parameter.shape[-1] ** 0.5)


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the model and its tokenizer; the folder opens as any checkpoint in Hugging Face layout does."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = FAMILIES[name].build(seed)
    model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    tokenizer = tiny_lm.tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(folder)
    return folder


def _sizes(**more: Any) -> dict[str, Any]:
    """Settings in the names that most configurations share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        **more,
    }


def _old(**more: Any) -> dict[str, Any]:
    """The same in GPT-2's names."""
    return {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": BLOCKS,
        "n_head": HEADS,
        "n_positions": CONTEXT,
        **more,
    }


def _causal(stem: str, **settings: Any) -> Family:
    return Family(f"{stem}ForCausalLM", f"{stem}Config", settings)


def _same(x: Tensor) -> Tensor:
    return x


def places(
    *,
    attn: str | None = "self_attn",
    mlp: str | None = "mlp",
    mid: str | None = "post_attention_layernorm:in",
    z: str = "o_proj",
    qkv: tuple[str, ...] | None = ("q_proj", "k_proj", "v_proj"),
    parts: Sequence[Read] = (_same, _same, _same),
    pre: str | None = "gate_proj:out",
    post: str | None = "down_proj:in",
    attn_out: str | None = "",
    mlp_out: str | None = "",
    factor: float = 1.0,
) -> Places:
    """Where a family has its activations; the defaults are Llama's. ``path:side`` below the block, or below the
    sublayer for z, qkv, pre and post."""

    def at(place: str | None, read: Read = _same) -> tuple[str, str, Read] | None:
        return None if place is None else (*place.split(":"), read)  # type: ignore[return-value]

    inside = "" if mlp in ("", None) else f"{mlp}."
    maps = [None] * 3 if qkv is None or attn is None else [f"{attn}.{qkv[i % len(qkv)]}:out" for i in range(3)]
    return {
        "hook_resid_pre": ("", "in", _same),
        "hook_resid_post": ("", "out", _same),
        "hook_resid_mid": at(mid),
        "hook_attn_out": at(attn and (attn_out or f"{attn}:out"), lambda x: x * factor),
        "hook_mlp_out": at(None if mlp is None else mlp_out or f"{mlp}:out", lambda x: x * factor),
        "attn.hook_z": at(attn and f"{attn}.{z}:in"),
        **{f"attn.hook_{letter}": at(maps[i], parts[i]) for i, letter in enumerate("qkv")},
        "mlp.hook_pre": at(pre and inside + pre),
        "mlp.hook_post": at(post and inside + post),
    }


def _thirds(i: int) -> Read:
    return lambda x: x.chunk(3, dim=-1)[i]


def _by_head(i: int) -> Read:
    return lambda x: x.unflatten(-1, (HEADS, 3, -1))[..., i, :].flatten(-2)


def _sized(kv_heads: int) -> list[Read]:
    return [lambda x, i=i: x.split((WIDTH, kv_heads * 8, kv_heads * 8), dim=-1)[i] for i in range(3)]


def _by_group(i: int) -> Read:
    slots = (slice(0, 2), slice(2, 3), slice(3, 4))[i]
    return lambda x: x.unflatten(-1, (2, 4, 8))[..., slots, :].flatten(-3)


def _codegen(i: int) -> Read:
    return lambda x: x.unflatten(-1, (4, 3, 16))[..., (0, 2, 1)[i], :].flatten(-2)


_THIRDS, _HEADS, _GROUPS, _PARTS = ([f(i) for i in range(3)] for f in (_thirds, _by_head, _by_group, _codegen))
_NEURONS: dict[str, Any] = {"pre": None, "post": None}  # of a mixture of experts: none
_LLAMA, _MIXTURE = places(), places(**_NEURONS)
_UNGATED = places(pre="up_proj:out")
_PARALLEL = places(mid=None)
_GEMMA_LIKE = places(
    mid="pre_feedforward_layernorm:in",
    attn_out="post_attention_layernorm:out",
    mlp_out="post_feedforward_layernorm:out",
)
_OLMO_LIKE = places(mid="mlp:in", attn_out="post_attention_layernorm:out", mlp_out="post_feedforward_layernorm:out")
_GPT2: dict[str, Any] = {"attn": "attn", "mid": "ln_2:in", "z": "c_proj", "pre": "c_fc:out", "post": "c_proj:in"}
_GPTJ: dict[str, Any] = {"attn": "attn", "mid": None, "z": "out_proj", "pre": "fc_in:out", "post": "fc_out:in"}
_NEOX: dict[str, Any] = {
    "z": "dense",
    "qkv": ("query_key_value",),
    "pre": "dense_h_to_4h:out",
    "post": "dense_4h_to_h:in",
}
_OPT: dict[str, Any] = {"mlp": "", "z": "out_proj", "pre": "fc1:out", "post": "fc2:in", "mlp_out": "fc2:out"}
_FALCON: dict[str, Any] = _NEOX | {"attn": "self_attention"}
_LATENT = places(qkv=None, **_NEURONS)
_NO_SUMS: Places = dict.fromkeys(("hook_resid_mid", "hook_attn_out", "hook_mlp_out"))
_NOTHING = places(attn=None, mlp=None, mid=None, **_NEURONS)

# Families that differ from Llama: where their activations are, and their list of blocks.
_ELSEWHERE: dict[str, tuple[Places, str]] = {
    "gpt2": (places(**_GPT2, qkv=("c_attn",), parts=_THIRDS), "transformer.h"),
    "gpt-neo": (places(**_GPT2 | {"attn": "attn.attention", "z": "out_proj"}), "transformer.h"),
    "gpt-j": (places(**_GPTJ), "transformer.h"),
    "pythia": (places(**_NEOX, attn="attention", mid=None, parts=_HEADS), "gpt_neox.layers"),
    "gpt-bigcode": (places(**_GPT2, qkv=("c_attn",), parts=_sized(1)), "transformer.h"),
    "codegen": (places(**_GPTJ, qkv=("qkv_proj",), parts=_PARTS), "transformer.h"),
    "openai-gpt": (places(**_GPT2 | {"mid": "ln_1:out"}, qkv=("c_attn",), parts=_THIRDS), "transformer.h"),
    "xglm": (places(**_OPT, mid="final_layer_norm:in"), "model.layers"),
    "opt": (places(**_OPT, mid="final_layer_norm:in"), "model.decoder.layers"),
    "opt-350m": (places(**_OPT, mid="self_attn_layer_norm:out"), "model.decoder.layers"),
    "biogpt": (places(**_OPT, mid="final_layer_norm:in"), "biogpt.layers"),
    "bloom": (
        places(**_FALCON, parts=_HEADS, attn_out="self_attention.dense:out", mlp_out="mlp.dense_4h_to_h:out"),
        "transformer.h",
    ),
    "mpt": (
        places(
            attn="attn",
            mlp="ffn",
            mid="norm_2:in",
            z="out_proj",
            qkv=("Wqkv",),
            parts=_THIRDS,
            pre="up_proj:out",
            mlp_out="ffn.down_proj:out",
        ),
        "transformer.blocks",
    ),
    "falcon-7b": (places(**_FALCON, mid=None, parts=_sized(1)), "transformer.h"),
    "falcon-40b": (places(**_FALCON, mid=None, parts=_GROUPS), "transformer.h"),
    "falcon-rw": (places(**_FALCON, parts=_HEADS), "transformer.h"),
    "persimmon": (places(**_NEOX, parts=_HEADS), "model.layers"),
    "phi2": (places(mid=None, z="dense", pre="fc1:out", post="fc2:in"), "model.layers"),
    "phi3": (places(qkv=("qkv_proj",), parts=_sized(2), pre="activation_fn:in"), "model.layers"),
    "glm": (places(pre="activation_fn:in"), "model.layers"),
    "glm4": (
        places(pre="activation_fn:in", attn_out="post_self_attn_layernorm:out", mlp_out="post_mlp_layernorm:out"),
        "model.layers",
    ),
    "starcoder2": (places(pre="c_fc:out", post="c_proj:in"), "model.layers"),
    "lfm2": (places(mlp="feed_forward", mid="ffn_norm:in", z="out_proj", pre="w1:out", post="w2:in"), "model.layers"),
    "jamba": (places(mlp="feed_forward", mid="pre_ff_layernorm:in", **_NEURONS), "model.layers"),
    "granite": (places(factor=0.5), "model.layers"),
    "granite-moe": (places(mlp="block_sparse_moe", factor=0.5, **_NEURONS), "model.layers"),
    "apertus": (places(pre="up_proj:out", mid="feedforward_layernorm:in"), "model.layers"),
    "qwen3-next": (_MIXTURE | {"attn.hook_q": None}, "model.layers"),
    "gemma3-multimodal": (_GEMMA_LIKE, "model.language_model.layers"),
    "gemma4": (_GEMMA_LIKE, "model.layers"),
    "llama4": (places(mlp="feed_forward", **_NEURONS), "model.layers"),
    "bamba": (places(mlp="feed_forward", mid="pre_ff_layernorm:in"), "model.layers"),
    # Attention, of half its size, and a state space are added to the stream at once.
    "falcon-h1": (
        places(mlp="feed_forward", mid="pre_ff_layernorm:in")
        | {
            "hook_attn_out": ("self_attn", "out", lambda x: x * 0.5),
            "attn.hook_k": ("self_attn.k_proj", "out", lambda x: x * 0.25),
            "mlp.hook_pre": ("feed_forward.gate_proj", "out", lambda x: x * 2.0),
        },
        "model.layers",
    ),
    "recurrent-gemma": (
        places(attn="temporal_block", mlp="mlp_block", mid="channel_pre_norm:in"),
        "model.layers",
    ),
    "nemotron-h": (places(attn="mixer", mlp=None, mid=None, **_NEURONS), "model.layers"),
    # These multiply the stream by a number, or a vector, before they add to it.
    "doge": (places(mid=None) | _NO_SUMS, "model.layers"),
    "minimax": (_MIXTURE | _NO_SUMS, "model.layers"),
    "vaultgemma": (places(mid="pre_feedforward_layernorm:in"), "model.layers"),
}
_ELSEWHERE |= dict.fromkeys(("mamba", "mamba2", "falcon-mamba"), (_NOTHING, "backbone.layers"))
_ELSEWHERE |= dict.fromkeys(("arcee", "nemotron"), (_UNGATED, "model.layers"))
_ELSEWHERE |= dict.fromkeys(("cohere", "cohere2", "stablelm-parallel"), (_PARALLEL, "model.layers"))
_ELSEWHERE |= dict.fromkeys(("gemma2", "gemma3"), (_GEMMA_LIKE, "model.layers"))
_ELSEWHERE |= dict.fromkeys(("olmo2", "olmo3", "exaone4"), (_OLMO_LIKE, "model.layers"))
_ELSEWHERE |= dict.fromkeys(("deepseek-v2", "deepseek-v3"), (_LATENT, "model.layers"))
_ELSEWHERE |= dict.fromkeys(
    ("mixtral", "phi3.5-moe", "qwen2-moe", "qwen3-moe", "olmoe", "glm4-moe", "gpt-oss"), (_MIXTURE, "model.layers")
)


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_GEMMA = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_ALL_HEADS = {"num_key_value_heads": HEADS}

_MODELS: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", _old()),
    "gpt-neo": _causal(
        "GPTNeo",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=CONTEXT,
    ),
    "gpt-j": _causal("GPTJ", **_old(rotary_dim=4)),
    "pythia": _causal("GPTNeoX", **_sizes(**_ALL_HEADS, rotary_pct=0.5)),
    "gpt-bigcode": _causal("GPTBigCode", **_old(multi_query=True)),
    "codegen": _causal("CodeGen", **_old(n_embd=64, rotary_dim=4)),
    "openai-gpt": Family("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _old()),
    "xglm": _causal(
        "XGLM",
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        ffn_dim=48,
        num_layers=BLOCKS,
        attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
    ),
    "opt": _causal("OPT", **_sizes(**_ALL_HEADS, ffn_dim=48, word_embed_proj_dim=WIDTH)),
    "opt-350m": _causal("OPT", **_sizes(**_ALL_HEADS, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)),
    "bloom": _causal("Bloom", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=BLOCKS, n_head=HEADS),
    "mpt": _causal("Mpt", vocab_size=VOCABULARY, d_model=WIDTH, n_layers=BLOCKS, n_heads=HEADS, max_seq_len=CONTEXT),
    "falcon-7b": _causal(
        "Falcon", **_sizes(**_ALL_HEADS, multi_query=True, parallel_attn=True, bias=False, alibi=False)
    ),
    "falcon-40b": _causal(
        "Falcon", **_sizes(**_ALL_HEADS, new_decoder_architecture=True, num_kv_heads=2, bias=False, alibi=False)
    ),
    "falcon-rw": _causal(
        "Falcon", **_sizes(**_ALL_HEADS, multi_query=False, parallel_attn=False, bias=True, alibi=True)
    ),
    "llama": _causal("Llama", **_sizes()),
    "llama3": _causal(
        "Llama",
        **_sizes(
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
    ),
    "mistral": _causal("Mistral", **_sizes(sliding_window=16)),
    "ministral3": _causal("Ministral3", **_sizes(head_dim=8)),
    "mixtral": _causal("Mixtral", **_sizes(**_LOCAL_EXPERTS)),
    "gemma1": _causal("Gemma", **_sizes(head_dim=8)),
    "gemma2": _causal("Gemma2", **_sizes(**_GEMMA, final_logit_softcapping=5.0, attn_logit_softcapping=10.0)),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", _sizes(**_GEMMA, layer_types=_SLIDING)),
    "gemma3-multimodal": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": _sizes(**_GEMMA, layer_types=_SLIDING),
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 5,  # more than the language model has
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 5,
            "eoi_token_index": 6,
            "image_token_index": 7,
        },
    ),
    "vaultgemma": _causal("VaultGemma", **_sizes(**_GEMMA, layer_types=_SLIDING)),
    "phi2": _causal("Phi", **_sizes(**_ALL_HEADS, partial_rotary_factor=0.5)),
    "phi3": _causal("Phi3", **_sizes()),
    "phi3.5-moe": _causal("Phimoe", **_sizes(**_LOCAL_EXPERTS)),
    "qwen2": _causal("Qwen2", **_sizes(tie_word_embeddings=True)),
    "qwen2-moe": _causal("Qwen2Moe", **_sizes(**_EXPERTS, shared_expert_intermediate_size=24)),
    "qwen3": _causal("Qwen3", **_sizes(head_dim=16)),
    "qwen3-moe": _causal("Qwen3Moe", **_sizes(**_EXPERTS, head_dim=8, decoder_sparse_step=1)),
    "qwen3-next": _causal(
        "Qwen3Next",
        **_sizes(
            **_EXPERTS,
            head_dim=8,
            shared_expert_intermediate_size=24,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),
    "olmo1": _causal("Olmo", **_sizes()),
    "olmo2": _causal("Olmo2", **_sizes()),
    "olmo3": _causal("Olmo3", **_sizes(sliding_window=16, layer_types=_SLIDING)),
    "olmoe": _causal("Olmoe", **_sizes(num_experts=4, num_experts_per_tok=2)),
    "stablelm": _causal("StableLm", **_sizes(**_ALL_HEADS, use_parallel_residual=False, partial_rotary_factor=0.5)),
    "stablelm-parallel": _causal("StableLm", **_sizes(**_ALL_HEADS, use_parallel_residual=True)),
    "starcoder2": _causal("Starcoder2", **_sizes(use_bias=True)),
    "nemotron": _causal("Nemotron", **_sizes(head_dim=8)),
    "cohere": _causal("Cohere", **_sizes(logit_scale=0.25)),
    "cohere2": _causal("Cohere2", **_sizes(logit_scale=0.25, head_dim=8, sliding_window=16, layer_types=_SLIDING)),
    "granite": _causal(
        "Granite",
        **_sizes(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.25),
    ),
    "granite-moe": _causal("GraniteMoe", **_sizes(**_LOCAL_EXPERTS, residual_multiplier=0.5, embedding_multiplier=3.0)),
    "smollm3": _causal("SmolLM3", **_sizes(no_rope_layers=[1, 0, 1])),
    "glm": _causal("Glm", **_sizes(head_dim=8, partial_rotary_factor=0.5)),
    "glm4": _causal("Glm4", **_sizes(head_dim=8, partial_rotary_factor=0.5)),
    "glm4-moe": _causal(
        "Glm4Moe",
        **_sizes(
            head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
    ),
    "deepseek-v2": _causal("DeepseekV2", **_sizes(**_LATENT_ATTENTION, **_ALL_HEADS)),
    "deepseek-v3": _causal("DeepseekV3", **_sizes(**_LATENT_ATTENTION, **_ALL_HEADS)),
    "gpt-oss": _causal("GptOss", **_sizes(**_LOCAL_EXPERTS, head_dim=8, sliding_window=16, layer_types=_SLIDING)),
    "exaone4": _causal("Exaone4", **_sizes(sliding_window=16, layer_types=_SLIDING)),
    "ernie4.5": _causal("Ernie4_5", **_sizes(head_dim=8)),
    "hunyuan": _causal("HunYuanDenseV1", **_sizes(head_dim=8)),
    "apertus": _causal("Apertus", **_sizes()),
    "arcee": _causal("Arcee", **_sizes()),
    "seed-oss": _causal("SeedOss", **_sizes(head_dim=8)),
    "bitnet": _causal("BitNet", **_sizes()),
    "lfm2": _causal("Lfm2", **_sizes(layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)),
    "mamba": _causal("Mamba", vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS, state_size=8),
    "mamba2": _causal(
        "Mamba2",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
    ),
    "falcon-mamba": _causal(
        "FalconMamba", vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS, state_size=8
    ),
    "jamba": _causal(
        "Jamba",
        **_sizes(
            num_experts=2,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=8,
            use_mamba_kernels=False,
        ),
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        _sizes(
            head_dim=8,
            global_head_dim=8,
            sliding_window=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=16,
            num_kv_shared_layers=0,
        ),
    ),
    "llama4": Family(
        "Llama4ForCausalLM", "Llama4TextConfig", _sizes(**_LOCAL_EXPERTS, head_dim=8, intermediate_size_mlp=48)
    ),
    "bamba": _causal(
        "Bamba",
        **_sizes(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16),
    ),
    "falcon-h1": _causal(
        "FalconH1",
        **_sizes(
            head_dim=8,
            attention_out_multiplier=0.5,
            key_multiplier=0.25,
            mlp_multipliers=[2.0, 0.5],
            ssm_out_multiplier=0.25,
            mamba_d_ssm=64,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=16,
        ),
    ),
    "recurrent-gemma": _causal(
        "RecurrentGemma",
        **_sizes(
            head_dim=8,
            num_key_value_heads=1,
            lru_width=WIDTH,
            attention_window_size=16,
            block_types=["recurrent", "attention", "recurrent"],
        ),
    ),
    "nemotron-h": _causal(
        "NemotronH",
        **_sizes(
            num_hidden_layers=4,
            head_dim=8,
            hybrid_override_pattern="M*-M",
            ssm_state_size=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=1,
            chunk_size=16,
        ),
    ),
    "doge": _causal("Doge", **_sizes()),
    "minimax": _causal(
        "MiniMax",
        **_sizes(
            **_LOCAL_EXPERTS,
            head_dim=8,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            block_size=16,
        ),
    ),
    "biogpt": _causal("BioGpt", **_sizes(**_ALL_HEADS)),
    "persimmon": _causal("Persimmon", **_sizes(**_ALL_HEADS, partial_rotary_factor=0.5)),
    "helium": _causal("Helium", **_sizes(head_dim=8)),
    "diffllama": _causal("DiffLlama", **_sizes()),
}

FAMILIES: dict[str, Family] = {
    name: replace(
        family, places=_ELSEWHERE.get(name, (_LLAMA, ""))[0], blocks=_ELSEWHERE.get(name, ("", "model.layers"))[1]
    )
    for name, family in _MODELS.items()
    if family.known
}
# One of each kind: fused and separate maps, parallel and sequential blocks, norms before and behind, multipliers, two
# mixtures, no attention, several modalities, and one that TransformerLens does not know.
QUICK = (
    "gpt2",
    "pythia",
    "bloom",
    "gemma2",
    "opt-350m",
    "gpt-oss",
    "mamba",
    "phi3",
    "granite",
    "gemma3-multimodal",
    "biogpt",
)
