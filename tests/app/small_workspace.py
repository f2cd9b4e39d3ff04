"""A small workspace as the app finds it: a tiny language model, a cache of its activations, one run per variant."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from saelab.data.cache import ActivationCache
from saelab.sae import build
from saelab.sae.weights import load_sae, save
from saelab.training import TrainConfig, train_steps

D_MODEL, D_SAE, CONTEXT = 32, 48, 16
# What a corpus can hold: markup, markdown, control and bidirectional characters.
HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "**bold**",
    "[a](javascript:alert(3))",
    "\u202ertl",
    "\x07",
)
WORDS = tuple("the river runs past a mill and old bridges while rain falls on green hills near grey towns".split())  # noqa: SIM905


def make_workspace(root: Path, variants: list[str]) -> Path:
    """A model in ``root/model``, a cache in ``root/cache`` and one run per variant in ``root/runs``."""
    torch.manual_seed(0)
    cache = make_cache(root, make_model(root / "model"))
    for name in variants:
        make_run(root / "runs" / name, name, cache)
        make_index(root / "runs" / name, cache)
    return root


def make_model(path: Path) -> Path:
    """A two-layer GPT-2 with a word-level tokenizer whose vocabulary contains the hostile tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<bos>", *(f"Ġ{w}" for w in WORDS), *WORDS, *HOSTILE, *(f"Ġ{h}" for h in HOSTILE)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace("Ġ", prepend_scheme="never"), pre_tokenizers.Split("Ġ", "merged_with_next")]
    )
    tokenizer.decoder = decoders.Metaspace("Ġ", prepend_scheme="never")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<bos>")
    fast.save_pretrained(path)
    shape = {"n_embd": D_MODEL, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), bos_token_id=1, eos_token_id=1, **shape)).save_pretrained(
        path
    )
    return path


def make_cache(root: Path, model: Path, contexts: int = 80) -> ActivationCache:
    """Activations (and stand-in gradients) of random word salad, hostile tokens included."""
    from transformers import GPT2LMHeadModel

    lm = GPT2LMHeadModel.from_pretrained(model).eval()
    tokens = torch.randint(2, lm.config.vocab_size, (contexts, CONTEXT))
    with torch.no_grad():
        acts = lm(tokens, output_hidden_states=True).hidden_states[1]
    return ActivationCache.from_tensors(
        root / "cache",
        acts,
        tokens,
        grads=torch.randn(acts.shape) * 1e-3,
        documents=torch.arange(contexts)[:, None].expand(-1, CONTEXT).contiguous(),
        held_out=0.1,
        model=str(model),
        hook_name="blocks.0.hook_resid_post",
        hf_hook_name="transformer.h.0",
    )


def make_run(path: Path, variant: str, cache: ActivationCache, steps: int = 24, **config: int) -> Path:
    """A run folder with weights, metadata and a log, after a few steps."""
    config = config or ({"k": 4} if variant in {"topk", "abs_topk"} else {})
    sae = build(variant, D_MODEL, D_SAE, **config)
    settings = TrainConfig(epochs=4, batch_size=128, lr=2e-3)
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("w") as log:
        for row in train_steps(sae, cache, settings):
            log.write(json.dumps(row.row()) + "\n")
    save(
        sae,
        path,
        {
            "model_name": cache.manifest.model,
            "hook_name": cache.hook_name,
            "hf_hook_name": cache.manifest.hf_hook_name,
            "cache_fingerprint": cache.fingerprint,
            "train": {"seed": 0, "batch_size": 128, "dead_after": 1000},
        },
    )
    return path


def make_index(path: Path, cache: ActivationCache) -> None:
    """The feature index of a run, with logit effects of the tiny model."""
    from saelab.features import IndexConfig, build_index

    lens, strings = unembedded(cache.manifest.model)
    build_index(load_sae(path), cache, path, lens=lens, token_strings=strings, config=IndexConfig(bins=20))


@functools.cache
def unembedded(model: str) -> tuple[Any, list[str]]:
    """The logit lens of a tiny model, and the text of each of its tokens."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from saelab.features import LogitLens

    lm = GPT2LMHeadModel.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    strings = [tokenizer.decode([i]) for i in range(lm.config.vocab_size)]
    return LogitLens(lm.lm_head.weight.detach().T, lm.transformer.ln_f.weight.detach(), centred=True), strings
