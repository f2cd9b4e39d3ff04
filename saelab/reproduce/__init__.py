"""Reproductions: the headline claims of the papers at small scale, each with its measurement and a verdict."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, near_matches
from saelab.reproduce.lab import Lab, Scale
from saelab.reproduce.ledger import Ledger, Row

# Each module has synthetic(folder, seeds, quick) -> rows and real(lab, seeds) -> rows. Where it has second(lab, seeds),
# that one repeats a claim on another model.
PAPERS = {
    "abs-topk": "saelab.reproduce.abs_topk",
    "g-sae": "saelab.reproduce.g_sae",
    "choice": "saelab.reproduce.choice",
    "mp-sae": "saelab.reproduce.mp_sae",
}

__all__ = ["PAPERS", "Lab", "Ledger", "Row", "Scale", "check", "reproduce"]


SEEDS, QUICK_SEEDS = 5, 3  # by default


def reproduce(
    paper: str,
    seeds: Sequence[int] | None = None,
    *,
    quick: bool = False,
    lab: Lab | None = None,
    second: Lab | None = None,
    synthetic: bool = True,
) -> Ledger:
    """Run a paper's rows: the synthetic ones always, those on real activations where a ``lab`` is given.

    ``quick`` shortens the synthetic rows to seconds each and leaves the others out. ``seeds`` are five by default,
    three with ``quick``. ``second`` is a lab with another model, for the papers that repeat a claim there.
    """
    default = range(QUICK_SEEDS if quick else SEEDS)
    seeds = default if seeds is None else seeds
    check(paper, len(seeds))
    module = importlib.import_module(PAPERS[paper])
    ledger = Ledger(paper, quick, list(seeds))
    if synthetic:
        with tempfile.TemporaryDirectory() as folder:
            ledger.rows += module.synthetic(Path(folder), seeds, quick)
    if lab is not None and not quick:
        ledger.settings, ledger.data = asdict(lab.scale), about(lab.cache)
        ledger.options = " --cache CACHE --out OUT" + changed(lab.scale) + ("" if synthetic else " --no-synthetic")
        lab.seconds.clear()  # one lab may serve several papers
        ledger.rows += module.real(lab, seeds)
        ledger.seconds_training = sum(lab.seconds.values())
        if second is not None and hasattr(module, "second"):
            second.seconds.clear()
            ledger.rows += module.second(second, seeds)
            ledger.seconds_training += sum(second.seconds.values())
            ledger.data["second"] = about(second.cache)
            ledger.options += " --second SECOND"
    if len(seeds) != len(default):
        ledger.options += f" --seeds {len(seeds)}"
    ledger.seconds = time.time() - ledger.started
    return ledger


def check(paper: str, n_seeds: int) -> None:
    """Refuse what :func:`reproduce` cannot run."""
    if paper not in PAPERS:
        raise UserError(f"unknown paper {paper!r}: {near_matches(paper, PAPERS)}")
    if n_seeds < 3:
        raise UserError(f"{n_seeds} seeds give no interval worth the name; name at least three")


def about(cache: ActivationCache) -> dict[str, Any]:
    """What identifies the activations of a ledger's rows: enough to harvest them again."""
    names = ("model", "revision", "hook_name", "text", "text_fingerprint", "context_length", "skip_first", "dtype")
    m = cache.manifest
    rows = {"rows": m.n_rows, "held_out_rows": cache.n_split("held_out"), "tokens": m.n_tokens}
    return {name: getattr(m, name) for name in names} | rows | {"fingerprint": cache.fingerprint}


def changed(scale: Scale) -> str:
    """The options that give this scale."""
    options = ""
    for name, value in asdict(scale).items():
        if value != getattr(Scale(), name):
            options += f" --{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
    return options
