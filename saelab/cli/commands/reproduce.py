"""``saelab reproduce``: run a paper's claims and print a verdict for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from saelab.cli.console import console, out, parse, part, print_json
from saelab.cli.placement import computing_device
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.reproduce import PAPERS, Lab, Ledger, Scale, check, reproduce

COLOURS = {"reproduced": "green", "not reproduced": "red", "not testable here": "yellow"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Which paper, and at which scale."""

    paper: tyro.conf.Positional[str]
    """abs-topk, g-sae, choice, mp-sae, or all."""
    quick: bool = False
    """Only the claims on planted data, with fewer steps; exits with code 1 if a verdict differs from the known one."""
    cache: Path | None = None
    """Activation cache for the claims on a language model; for g-sae one with gradients."""
    model: str | None = None
    """Language model; by default the one the cache was harvested from."""
    out: Path | None = None
    """Folder for PAPER.json; trained SAEs are kept in its subfolder `runs` and used again."""
    device: str = "auto"
    """Where SAEs are trained on the cache and the language model runs: cpu, cuda, cuda:1, mps; auto takes a GPU if
    there is one. Claims on planted data are small and run on the CPU."""
    seeds: int = 3
    """Seeds per setting, at least three."""
    synthetic: bool = True
    """Also test the claims on planted data."""
    json: bool = False
    """Print the ledgers as JSON on stdout."""


def main(args: Sequence[str]) -> None:
    """Run the ledger of one paper, or of all."""
    # A scale's fields come after ours, so it is the first base.
    cls = dataclasses.make_dataclass("ReproduceOptions", [], bases=(Scale, Options), frozen=True)
    options = parse(
        cls,
        "reproduce",
        args,
        "Test the headline claims of a paper, with several seeds, intervals and a verdict for each.",
    )
    names = list(PAPERS) if options.paper == "all" else [options.paper]
    for name in names:
        check(name, options.seeds)
    scale = part(Scale, options)
    lab = None if options.quick or options.cache is None else open_lab(options, scale)
    ledgers = []
    for name in names:
        console.print(f"[bold]{name}[/]")
        ledger = reproduce(name, range(options.seeds), quick=options.quick, lab=lab, synthetic=options.synthetic)
        if options.out is not None:
            ledger.save(options.out / f"{name}.json")
        ledgers.append(ledger)
        if not options.json:
            show(ledger)
    if options.json:
        print_json([ledger.content() for ledger in ledgers])
    changed = [row.claim for ledger in ledgers for row in ledger.rows if row.synthetic and row.verdict != row.expected]
    if options.quick and changed:
        console.print(f"[red]verdicts that changed: {'; '.join(changed)}[/]")
        raise SystemExit(1)


def open_lab(options: Options, scale: Scale) -> Lab:
    """The cache, its model, and the folder that keeps trained SAEs."""
    if options.out is None:
        raise UserError("claims on a cache need --out, the folder that keeps the trained SAEs")
    cache, device = ActivationCache(options.cache or ""), computing_device(options.device)
    name = options.model or cache.manifest.model
    model = decode = None
    if name:
        from saelab.lm.record import ModelRecord, load_recorded

        model = load_recorded(ModelRecord.from_manifest(cache.manifest), str(cache.path), name=name, device=device)
        decode = model.tokenizer.decode
    # Another cache or recipe gives other SAEs: each has its own folder of runs.
    recipe = f"{cache.fingerprint}-{scale.d_sae}x{scale.epochs}x{scale.batch_size}x{scale.lr or 'auto'}"
    return Lab(cache, model, scale, options.out / "runs" / recipe, console.print, decode, device)


def show(ledger: Ledger) -> None:
    """One line per claim."""
    for row in ledger.rows:
        out.print(f"[{COLOURS[row.verdict]}]{row.verdict:<18}[/] {row.claim}")
    out.print(f"[dim]{ledger.seconds:.0f} s, seeds {ledger.seeds}[/]")
