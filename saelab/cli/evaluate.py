"""``saelab evaluate``: reconstruction, sparsity, dead latents, and the language model with the SAE spliced in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from saelab import checkpoint
from saelab.cli.common import console, out, parse, print_json, progress_bar
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluate import EvaluateConfig, Evaluation, evaluate


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run, and on what."""

    run: tyro.conf.Positional[Path]
    """Run folder; evaluation.json is written into it."""
    cache: Path
    """Folder of the activation cache; its held-out rows are evaluated."""
    model: str | None = None
    """Language model for cross-entropy and KL; by default the one the cache was harvested from."""
    json: bool = False
    """Print the evaluation as JSON on stdout."""


# The evaluation's options come after ours in the list of fields, so they are the first base.
EvaluateOptions = dataclasses.make_dataclass("EvaluateOptions", [], bases=(EvaluateConfig, Options), frozen=True)
SHOWN = (
    *("fvu", "l0", "cosine", "relative_reconstruction_bias", "dead_fraction", "dense_fraction"),
    *("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_recovered_zero", "ce_loss_recovered_mean"),
    *("kl_div_with_sae", "kl_recovered_zero"),
)


def main(args: Sequence[str]) -> None:
    """Evaluate a run and write ``evaluation.json``."""
    options = parse(EvaluateOptions, "evaluate", args, "Measure a trained SAE on held-out activations.")
    config = EvaluateConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(EvaluateConfig)})
    result = run(options.run, options.cache, options.model, config)
    if options.json:
        print_json(result.content())
    else:
        show(result)
        out.print(f"saved to {options.run / 'evaluation.json'}")


def run(folder: Path, cache_folder: Path, model_name: str | None, config: EvaluateConfig) -> Evaluation:
    """Load everything, evaluate with a progress bar, save."""
    sae, cache = checkpoint.load_sae(folder), ActivationCache(cache_folder)
    check_provenance(checkpoint.load_metadata(folder), cache, folder)
    model, name = None, model_name or cache.manifest.model
    if config.lm_tokens and not name:
        console.print("the cache names no model: cross-entropy and KL are left out; give one with --model")
    elif config.lm_tokens:
        from saelab.lm import load_model

        model = load_model(name)
    with progress_bar() as bar:
        tasks: dict[str, int] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)  # pyright: ignore[reportArgumentType]

        result = evaluate(sae, cache, model, config, progress)
    result.save(folder)
    return result


def check_provenance(metadata: dict, cache: ActivationCache, folder: Path) -> None:
    """Refuse a cache of another model or hook point than the run was trained on; another text is fine."""
    for key, have in (("model_name", cache.manifest.model), ("hook_name", cache.hook_name)):
        want = metadata.get(key)
        if want and have and want != have:
            raise UserError(
                f"{folder} was trained on {key}={want}, {cache.path} holds {have}; evaluate on its own kind"
            )


def show(result: Evaluation) -> None:
    """The main numbers, one a line, each with its interval and sample."""
    for name in SHOWN:
        if name not in result.metrics:
            continue
        e = result.metrics[name]
        interval = f"{e.low:.4f} .. {e.high:.4f}" if e.low is not None else "no interval"
        out.print(f"{name:<30} {e.value:>9.4f}   [dim]{interval}, {e.n:,} {e.unit}s[/]")
    window = result.histogram["tokens"]
    out.print(f"[dim]dead and dense latents counted over {window:,} tokens; intervals are 95 %[/]")
