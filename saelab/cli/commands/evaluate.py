"""``saelab evaluate``: reconstruction, sparsity, dead latents, and the language model with the SAE spliced in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from saelab.cli.console import console, out, parse, part, print_json, stages
from saelab.cli.models import ModelOptions, complete_tokens, open_model
from saelab.cli.opening import open_run, open_with_cache
from saelab.cli.placement import computing_device, follows, join
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import (
    EvaluateConfig,
    Evaluation,
    TaskConfig,
    evaluate,
    fit_remark,
    l0_remark,
    run_tasks,
    saebench_json,
    shared_with_seeds,
    split_remark,
    stability,
)
from saelab.evaluation.controls import ControlConfig, measure_controls
from saelab.evaluation.report import SHOWN, control_rows, headline
from saelab.evaluation.seeds import check as check_seeds
from saelab.evaluation.tasks.scr_tpp import AUDIT
from saelab.files import write_json
from saelab.lm.record import ModelRecord, load_settings


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run, and on what."""

    run: tyro.conf.Positional[str]
    """Folder of a run, or of another tool's SAE, or a hub id (hf://org/repo/path); evaluation.json is written into the
    folder, for a hub id into a copy of it."""
    cache: Path
    """Folder of the activation cache; its held-out rows are evaluated."""
    target: Path | None = None
    """Folder of the cache of a transcoder's target; by default the one beside the cache that has its hook point."""
    seeds: tuple[str, ...] = ()
    """Runs of the same SAE with other seeds: adds the share of latents that they have in common, beside chance."""
    saebench: Path | None = None
    """Also write SAEBench's JSON files: name a folder to write one file per evaluation, in the subfolders that
    SAEBench's plots read, or a .json file for the core evaluation alone."""
    out: Path | None = None
    """Copy the SAE into this folder and write evaluation.json there. By default an SAE from the hub is copied into the
    working folder, under the name of its repository; other SAEs are not copied. A single file is converted."""
    json: bool = False
    """Print the evaluation as JSON on stdout."""


# The evaluation's options come after ours in the list of fields, so they are the first base.
EvaluateOptions = dataclasses.make_dataclass(
    "EvaluateOptions", [], bases=(TaskConfig, EvaluateConfig, ControlConfig, ModelOptions, Options), frozen=True
)


def main(args: Sequence[str]) -> None:
    """Evaluate a run and write ``evaluation.json``."""
    options = parse(EvaluateOptions, "evaluate", args, "Measure a trained SAE on held-out activations.")
    config, tasks = part(EvaluateConfig, options), part(TaskConfig, options)
    if options.saebench is not None and options.saebench.suffix == ".json" and tasks.tasks:
        raise UserError(f"--saebench {options.saebench} holds one result, tasks give several; name a folder")
    model, controls = part(ModelOptions, options), part(ControlConfig, options)
    places = options.out, options.saebench, options.seeds, options.target
    result = run(options.run, options.cache, model, config, tasks, *places, controls)
    if options.json:
        print_json(result.content())
    else:
        show(result)


def run(
    name: Path | str,
    cache_folder: Path,
    options: ModelOptions,
    config: EvaluateConfig,
    tasks: TaskConfig | None = None,
    out: Path | None = None,
    saebench: Path | None = None,
    seeds: Sequence[str] = (),
    target: Path | None = None,
    controls: ControlConfig | None = None,
) -> Evaluation:
    """Load everything, evaluate with a progress bar, save, and print where."""
    place = computing_device(options.device)
    join(options.tensor_parallel, place)
    (opened, cache, folder), wanted = open_with_cache(name, cache_folder, out, target), tasks or TaskConfig()
    sae = opened.sae.to(place)
    others = [open_run(other).sae for other in seeds]
    if others:
        check_seeds(sae, others)
    model, known = None, options.model or cache.manifest.model
    if config.lm_tokens and not known:
        console.print("the cache names no model: cross-entropy and KL are left out; give one with --model")
    elif config.lm_tokens or wanted.labels is not None or "sae-probes" in wanted.tasks:
        if not known:
            raise UserError(
                f"{wanted.labels or 'sae-probes'} must run through the language model; the cache names none, so give "
                "one with --model"
            )
        model = open_model(options, ModelRecord.from_manifest(cache.manifest), str(cache.path))
        complete_tokens(cache, model)
    with stages() as progress:
        # The tasks come first, so that an error in the labels shows before minutes of language model passes.
        found = run_tasks(
            sae, cache, wanted, model, seed=config.seed, any_weights=config.any_weights, progress=progress
        )
        result = evaluate(sae, cache, model, config, progress)
        result.tasks = found
        if others:
            result.metrics |= shared_with_seeds(sae, others)
            stability(sae, others, seeds).save(folder)
        if controls is not None and controls.kinds:
            result.controls = measure_controls(
                sae, cache, result["l0"], config, wanted, controls, model=model, folder=folder, progress=progress,
                random_model=with_random_weights(options, cache, controls.control_seed) if known else None,
            )  # fmt: skip
    console.print(f"saved to {result.save(folder)}", markup=False, soft_wrap=True)
    audit = AUDIT if {"scr", "tpp"} & found.keys() else None
    for remark in filter(None, (fit_remark(result["fvu"]), l0_remark(sae, result), split_remark(result), audit)):
        console.print(f"note: {remark}", markup=False, soft_wrap=True)
    if saebench is not None and not follows():
        write_saebench(result, folder, saebench, wanted)
    return result


def with_random_weights(options: ModelOptions, cache: ActivationCache, seed: int) -> Callable[[], Any]:
    """What loads the language model of the cache with random weights."""

    def load() -> Any:
        from saelab.lm.loading import load_model
        from saelab.lm.randomised import RandomWeights

        record = ModelRecord.from_manifest(cache.manifest)
        name = options.model or record.name
        dtype, revision = load_settings(record, name, options.model_dtype, options.revision)
        where: dict[str, Any] = {"device": options.device, "device_map": options.device_map, "revision": revision}
        where["tensor_parallel"] = options.tensor_parallel
        return load_model(name, dtype=dtype, random_weights=RandomWeights(seed=seed), **where)

    return load


def write_saebench(result: Evaluation, run: Path, path: Path, tasks: TaskConfig) -> None:
    """SAEBench's JSON of a result, as one file or in the folders that its plots read."""
    about = {**dataclasses.asdict(tasks), "labels": str(tasks.labels or "the text of the cache"), **result.settings}
    contents = saebench_json.documents(result, run, about)
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, contents[0])
        return
    for content in contents:
        console.print(f"saved {saebench_json.save(content, path)}", markup=False)


def show(result: Evaluation) -> None:
    """The main numbers, one a line, each with its interval and sample, and with those of the controls."""
    if result.controls:
        for line in control_lines(result.content()):
            out.print(line, markup=False, soft_wrap=True)
    for name in SHOWN:
        if name not in result.metrics:
            continue
        e = result.metrics[name]
        interval = f"{e.low:.4f} .. {e.high:.4f}" if e.low is not None else f"no interval ({e.interval[6:]})"
        out.print(f"{name:<30} {e.value:>9.4f}   [dim]{interval}, {e.n:,} {e.unit}s[/]")
    for task, numbers in result.tasks.items():
        for name, value in headline(task, numbers):
            out.print(f"{task + ' ' + name:<40} {value:>9.4f}")
    window = result.histogram["tokens"]
    documents = result.settings.get("documents", 0)
    out.print(
        f"[dim]dead and dense latents counted over {window:,} tokens; intervals are 95 %, over {documents:,} "
        "documents[/]"
    )


def control_lines(content: dict[str, Any]) -> Iterator[str]:
    """A line per number: the SAE's, and that of each control. A control that could not be made is a line below."""
    names = {name: name.replace("_", " ") for name, found in content["controls"].items() if "cannot" not in found}
    yield f"{'':<38} {'SAE':>9}" + "".join(f"  {said:>9}" for said in names.values())
    for row in control_rows(content):
        line = f"{row.name:<38} {row.value:>9.4f}"
        for name, said in names.items():
            cell = f"{row.controls[name]:.4f}" if name in row.controls else "-"
            line += f"  {cell:>{max(len(said), 9)}}"
        yield line
    for name, found in content["controls"].items():
        if "cannot" in found:
            yield f"no {name.replace('_', ' ')}: {found['cannot']}"
