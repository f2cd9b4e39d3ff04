"""``saelab card``: write the model card of a run folder, as it is shown on the hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from saelab.cli.console import out, parse, with_local_run
from saelab.files import replace
from saelab.layout import CARD
from saelab.runs import Run
from saelab.runs.card import model_card


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run."""

    run: tyro.conf.Positional[Path]
    """Run folder; its README.md is written, from cfg.json and evaluation.json."""
    repo: str | None = None
    """Hub repository named in the loading snippet (org/repo); by default the snippet loads the folder."""


def main(args: Sequence[str]) -> None:
    """Write README.md into the run."""
    options = parse(Options, "card", args, "Write the model card of a run: what it is, its metrics, how to load it.")
    options = with_local_run(options)
    path = options.run / CARD
    card = model_card(Run.open(options.run), options.repo)
    replace(path, lambda partial: partial.write_text(card, encoding="utf-8"))
    out.print(f"saved to {path}", markup=False, soft_wrap=True)
