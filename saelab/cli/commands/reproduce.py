"""``saelab reproduce``: run a paper's claims and print a verdict for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from saelab.cli.console import console, out, parse, part, print_json
from saelab.cli.placement import computing_device
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.reproduce import PAPERS, SEEDS, Lab, Ledger, Scale, check, reproduce

COLOURS = {"supported": "green", "contradicted": "red", "inconclusive": "yellow", "floor": "yellow",
           "not attributable": "magenta", "not testable here": "dim"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Which paper, and at which scale."""

    paper: tyro.conf.Positional[str]
    """abs-topk, g-sae, choice, mp-sae, or all."""
    quick: bool = False
    """Only the claims on planted data, with fewer steps; exits with code 1 if a verdict differs from the known one."""
    cache: Path | None = None
    """Activation cache for the claims on a language model."""
    gradients: Path | None = None
    """Cache with gradients, for g-sae; by default the one of --cache."""
    second: Path | None = None
    """Cache of another model, on which a claim is repeated."""
    model: str | None = None
    """Language model; by default the one that each cache was harvested from."""
    out: Path | None = None
    """Folder for PAPER.json; trained SAEs are kept in its subfolder `runs` and used again."""
    device: str = "auto"
    """Where SAEs are trained on the cache and the language model runs: cpu, cuda, cuda:1, mps; auto takes a GPU if
    there is one. Claims on planted data are small and run on the CPU."""
    seeds: int | None = None
    """Seeds per setting, at least three; by default 5, with --quick 3."""
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
        check(name, SEEDS if options.seeds is None else options.seeds)
    seeds = None if options.seeds is None else range(options.seeds)
    scale = part(Scale, options)
    open_at = functools.cache(lambda path: None if options.quick or path is None else open_lab(path, options, scale))
    ledgers = []
    for name in names:
        console.print(f"[bold]{name}[/]")
        lab = open_at(options.gradients if name == "g-sae" and options.gradients else options.cache)
        ledger = reproduce(
            name, seeds, quick=options.quick, lab=lab, second=open_at(options.second), synthetic=options.synthetic
        )
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


def open_lab(path: Path, options: Options, scale: Scale) -> Lab:
    """A cache, its model, and the folder that keeps trained SAEs."""
    if options.out is None:
        raise UserError("claims on a cache need --out, the folder that keeps the trained SAEs")
    cache, device = ActivationCache(path), computing_device(options.device)
    name = options.model or cache.manifest.model
    model = decode = None
    if name:
        from saelab.lm.record import ModelRecord, load_recorded

        model = load_recorded(ModelRecord.from_manifest(cache.manifest), str(cache.path), name=name, device=device)
        decode = model.tokenizer.decode
    # Another cache or recipe gives other SAEs: each has its own folder of runs.
    recipe = f"{cache.fingerprint}-{scale.d_sae}x{scale.epochs}x{scale.batch_size}x{scale.lr or 'tuned'}"
    return Lab(cache, model, scale, options.out / "runs" / recipe, console.print, decode, device)


def show(ledger: Ledger) -> None:
    """One line per claim."""
    for row in ledger.rows:
        out.print(
            f"[{COLOURS[row.verdict]}]{row.verdict:<18}[/] {row.claim}{by_budget(row.measured.get('verdicts', {}))}"
        )
    out.print(f"[dim]{ledger.seconds:.0f} s, seeds {ledger.seeds}[/]")


def by_budget(verdicts: Mapping[str, Any]) -> str:
    """The verdicts at each budget, for the line of a claim."""
    flat = {k: v for k, v in verdicts.items() if isinstance(v, str)}
    return f" [dim]({', '.join(f'k={k}: {v}' for k, v in flat.items())})[/]" if flat else ""
