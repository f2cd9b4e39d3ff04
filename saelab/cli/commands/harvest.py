"""``saelab harvest``: text through a language model into an activation cache."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

from saelab.cli.console import SPINNER, console, counting, out, parse, part, print_json, quiet
from saelab.data.cache.merge import cache_summary


@dataclasses.dataclass(frozen=True)
class Options:
    """Which model, which hook points, which text."""

    out: str
    """Folder or URL of the cache; with several hooks, each gets a sub-folder."""
    hook: tuple[str, ...] = ("blocks.9.hook_resid_post",)
    """Hook points: TransformerLens names or Hugging Face module paths, or patterns of these:
    `blocks.*.hook_resid_post`, `blocks.3,9,15.hook_mlp_out`, `blocks.0-29:3.hook_resid_post` (every third layer)."""
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
    device: str = "auto"
    """Where the model runs: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one, under torchrun one for
    each process."""
    device_map: str | None = None
    """Spread the model over devices, host memory (cpu) and disk: auto, balanced or sequential, or what is where,
    `rest=cuda:0,model.layers.20-31=disk`, or a .json file of it (needs accelerate)."""
    tensor_parallel: bool = False
    """Divide the model over the processes of torchrun, by the plan that transformers has for it; without it each
    process has the whole model and harvests its share of the text."""
    model_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Precision the model runs in; auto is that of its checkpoint on a CUDA GPU, and float32 elsewhere. The cache
    records it, and later commands use it."""
    random_weights: Literal["none", "all", "all-but-embeddings"] = "none"
    """Draw the model's weights at random, for a control: each parameter becomes Gaussian numbers of its own mean and
    standard deviation, with or without the embeddings (arXiv 2501.17727)."""
    random_seed: int = 0
    """Seed of the random weights."""
    overwrite: bool = False
    """Replace an existing cache."""
    resume: bool = False
    """Continue an interrupted harvest with the same settings; a finished one is left as it is."""
    timeout_s: float = 3600.0
    """Seconds that a process under torchrun waits for the others before all stop; must exceed the time that the slowest
    one needs for a shard."""
    json: bool = False
    """Print a description of the caches as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Parse, load the model, harvest with a progress bar, print a summary."""
    # Imported here: the settings belong to the gateway of the language models.
    from saelab.distributed.failures import naming_lost
    from saelab.harvesting import HarvestConfig

    cls = dataclasses.make_dataclass("HarvestOptions", [], bases=(HarvestConfig, Options), frozen=True)
    options: Any = parse(
        cls, "harvest", args, "Run text through a language model and cache its activations at one or more hook points."
    )
    config = part(HarvestConfig, options)
    try:
        with naming_lost():
            run(options, config)
    except KeyboardInterrupt:
        console.print("interrupted; the same command with --resume continues after the last complete shard")
        sys.exit(130)


def place(options: Any) -> tuple[Any, Any]:
    """This process's share of the harvest and its device; under torchrun, one process of many."""
    from saelab.devices import pick_device
    from saelab.distributed import launched, start_world
    from saelab.distributed.exchange import exchange_bytes
    from saelab.harvesting import Share

    device = pick_device(options.device)
    if not launched():
        return Share(), device
    waits = {"timeout_s": options.timeout_s, "checkpoint_timeout_s": options.timeout_s}
    parallel = start_world(device=device if options.tensor_parallel else "cpu", **waits)
    quiet(not parallel.is_main)
    told = exchange_bytes, options.tensor_parallel
    return Share(parallel.data_rank, parallel.data_size, parallel.barrier, *told), device


def running_dtype(asked: str, device: Any) -> str:
    """The precision to load the model in: on a GPU, ``auto`` is the checkpoint's own, in which it was trained or saved.

    CPUs compute 16 bits more slowly than 32, where they do not emulate them.
    """
    return asked if asked != "auto" or device.type == "cuda" else "float32"


def run(options: Any, config: Any) -> None:
    """Harvest as the options say."""
    from saelab.data.text import open_text
    from saelab.data.text.source import listed
    from saelab.distributed.world import end_world
    from saelab.harvesting import harvest, harvest_many
    from saelab.lm import load_model
    from saelab.lm.hook_patterns import is_pattern
    from saelab.lm.randomised import RandomWeights

    share, device = place(options)
    source = open_text(options.text, split=options.text_split, column=options.text_column)
    with console.status(f"loading {options.model} (converted on first use)", spinner=SPINNER):
        where: dict[str, Any] = {"device_map": options.device_map, "device": device, "revision": options.revision}
        where["tensor_parallel"] = options.tensor_parallel
        if options.random_weights != "none":
            where["random_weights"] = RandomWeights(options.random_weights, options.random_seed)
        model = load_model(options.model, dtype=running_dtype(options.model_dtype, device), **where)
    settings: Any = {"overwrite": options.overwrite, "resume": options.resume, "share": share}
    with counting("harvest") as progress:
        if len(options.hook) == 1 and not is_pattern(options.hook[0]):
            cache = harvest(model, options.hook[0], source, options.out, config, progress=progress, **settings)
            caches = {cache.hook_name: cache}
        else:
            caches = harvest_many(model, options.hook, source, options.out, config, progress=progress, **settings)
    end_world()
    found = [cache_summary(cache) for cache in caches.values()]
    if options.json:
        print_json(found[0] if len(found) == 1 else found)
        return
    for cache in found:
        out.print(
            f"{cache['rows']:,} activations of {cache['hook_name']} (d_in {cache['d_in']}, {cache['dtype']}, "
            f"mean norm {cache['mean_norm']:.4g}) from {cache['documents']} documents of {cache['text']}"
        )
        out.print(f"saved to {cache['path']}", markup=False, soft_wrap=True)
    if found[0]["left_out"]:
        console.print(f"left out of the text: {listed(found[0]['left_out'])}", markup=False)
    if found[0]["tokens"] < config.tokens:
        console.print(
            f"{found[0]['text']} ended after {found[0]['tokens']:,} of {config.tokens:,} tokens", markup=False
        )
