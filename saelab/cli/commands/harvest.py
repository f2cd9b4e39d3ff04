"""``saelab harvest``: text through a language model into an activation cache."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

from saelab.cli.console import console, counting, out, parse, part, print_json, quiet
from saelab.cli.sources import SourceOptions, open_source
from saelab.data.cache.merge import cache_summary

# Mean squared norm over the squared mean norm: with 2, half of the energy is that of an even cache. It is 1.06 in the
# middle of SmolLM2, and 2.2 at its layer 15, where 0.03 % of the tokens are sinks with half of the energy.
UNEVEN = 2.0


@dataclasses.dataclass(frozen=True)
class Places:
    """What is harvested, and where it is kept."""

    out: str
    """Folder or URL of the cache; with several hooks, each gets a sub-folder."""
    hook: tuple[str, ...] = ("blocks.9.hook_resid_post",)
    """Hook points: TransformerLens names or Hugging Face module paths, or patterns of these:
    `blocks.*.hook_resid_post`, `blocks.3,9,15.hook_mlp_out`, `blocks.0-29:3.hook_resid_post` (every third layer)."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How the model runs, and what becomes of a cache that is there."""

    device: str = "auto"
    """Where the model runs: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one, under torchrun one for
    each process."""
    tensor_parallel: bool = False
    """Divide the model over the processes of torchrun, by the plan that transformers has for it; without it each
    process has the whole model and harvests its share of the text."""
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

    bases = HarvestConfig, Options, SourceOptions, Places  # the help shows the last ones first
    cls = dataclasses.make_dataclass("HarvestOptions", [], bases=bases, frozen=True)
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


def run(options: Any, config: Any) -> None:
    """Harvest as the options say."""
    from saelab.data.text.source import listed
    from saelab.distributed.world import end_world
    from saelab.harvesting import harvest, harvest_many
    from saelab.lm.hook_patterns import is_pattern
    from saelab.lm.randomised import RandomWeights

    share, device = place(options)
    how: dict[str, Any] = {"tensor_parallel": options.tensor_parallel}
    if options.random_weights != "none":
        how["random_weights"] = RandomWeights(options.random_weights, options.random_seed)
    model, source = open_source(options, device, **how)
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
        if cache["rms_norm"] ** 2 > UNEVEN * cache["mean_norm"] ** 2:
            console.print(
                f"note: uneven norms (mean {cache['mean_norm']:.4g}, root mean square {cache['rms_norm']:.4g}): "
                "a few tokens, such as attention sinks, hold much of the variance, and so of the training and of the "
                "FVU; --max-norm leaves them out",
                markup=False,
            )
    if found[0]["left_out"]:
        console.print(f"left out of the text: {listed(found[0]['left_out'])}", markup=False)
    if found[0]["tokens"] < config.tokens:
        console.print(
            f"{found[0]['text']} ended after {found[0]['tokens']:,} of {config.tokens:,} tokens", markup=False
        )
