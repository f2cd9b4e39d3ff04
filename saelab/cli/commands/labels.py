"""``saelab labels``: import labels of latents that others have published for the SAE."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from saelab.cli.console import console, out, parse, print_json
from saelab.cli.opening import print_notes, results_folder, same_model
from saelab.features.explanations.imported import LabelFile, read_labels, save_labels
from saelab.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Which SAE, and which labels."""

    run: tyro.conf.Positional[str]
    """Folder of a run, or of another tool's SAE, or a hub id (hf://org/repo/path); labels.parquet is written into the
    folder, for a hub id into a copy of it."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files of Neuronpedia's export of explanations (.jsonl, .jsonl.gz, .json), or folders of them. They replace the
    labels that were imported before."""
    hook: str | None = None
    """Hook point of the SAE, where its files do not record it, e.g. blocks.9.hook_resid_post."""
    out: Path | None = None
    """Copy the SAE into this folder and write the labels there. By default an SAE from the hub is copied into the
    working folder, under the name of its repository; other SAEs are not copied. A single file is converted."""
    json: bool = False
    """Print the counts as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Read the labels, check that they can be this SAE's, and keep them beside it."""
    options = parse(Options, "labels", args, "Import labels of latents that Neuronpedia exports for a public SAE.")
    run = Run.open(options.run, options.hook or "")
    print_notes(run.notes)
    found = read_labels(options.files, run.d_sae or run.sae.d_sae, run.metadata.get("hook_name"))
    print_notes(doubts(run, found))
    folder = results_folder(run, options.out)
    save_labels(folder, found)
    left_out = {"repeated": found.repeated, "empty": found.empty}
    if options.json:
        print_json({"labels": len(found.labels), "of": run.d_sae, "source": sorted(found.layers), **left_out})
        return
    counted = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
    out.print(f"{len(found.labels):,} labels of {run.d_sae:,} latents" + (f"; left out: {counted}" if counted else ""))
    console.print(f"saved to {folder}; the app shows them, with their source", markup=False, soft_wrap=True)


def doubts(run: Run, found: LabelFile) -> list[str]:
    """What could not be checked, or does not fit by its name, one sentence each."""
    notes = [f"the labels are of {m}, the SAE of {run.model_name}" for m in found.models if not same_model(m, run)]
    if not found.layers:
        notes.append("the labels do not say which SAE they are of; that cannot be checked")
    elif not run.metadata.get("hook_name"):
        notes.append("the SAE does not record its hook point; whether the labels are of its layer cannot be checked")
    return notes
