"""The choice of a learning rate: SAEs that differ only in their seed get the one that was best for the first."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saelab.data.cache import ActivationCache
from saelab.evaluation.reconstruction import reconstruction
from saelab.sae.controller import NEAR
from saelab.sae.weights import load_sae
from saelab.sweep.grid import Entry, Grid
from saelab.sweep.member import Member
from saelab.sweep.tuning import named
from saelab.training import TrainConfig, finished

CANDIDATES = "tuning"  # in the sweep's folder: the SAEs of the rates that are being tried
EXTENSIONS = 2  # rates tried beyond the given multiples, where the best one is the smallest or the largest


@dataclass
class Group:
    """Entries that differ only in their seed. ``record`` is theirs in ``sweep.json``, and all that a resume needs.

    It has ``rates``, ``tried`` (one dict per rate: lr, fvu and l0 on validation rows, status, step, message) and
    ``chosen``, which is None until all have been tried, and where none could be used.
    """

    entries: Sequence[Entry]
    record: dict[str, Any]
    folder: Path  # of the sweep

    @property
    def lead(self) -> Entry:
        """The entry whose seed the rates are tried with."""
        return self.entries[0]

    @property
    def candidates(self) -> list[Entry]:
        """The first entry at every rate."""
        return [_at(self.lead, rate, f"{self.lead.name}/lr-{named(rate)}") for rate in self.record["rates"]]

    @property
    def settled(self) -> bool:
        """Whether nothing remains to be tried."""
        return "message" in self.record

    @property
    def chosen(self) -> list[Entry]:
        """The entries at the chosen rate; none before it is chosen, or where every rate failed."""
        rate = self.record["chosen"]
        return [] if rate is None else [_at(entry, rate, entry.name) for entry in self.entries]

    def place(self, entry: Entry) -> Path:
        """The run folder of a candidate."""
        return self.folder / CANDIDATES / entry.name

    def try_out(self, member: Member, score: Callable[[Path], tuple[float, float]]) -> None:
        """Record how a candidate ended; ``score`` gives FVU and L0 on validation rows."""
        lr = member.entry.train.lr
        if member.status == "running" or any(trial["lr"] == lr for trial in self.record["tried"]):
            return
        fvu, l0 = score(member.folder) if member.status == "finished" else (None, None)
        trial = {"lr": lr, "fvu": fvu, "l0": l0, "status": member.status, "step": member.step}
        # Sorted, so that the order does not tell where the sweep was interrupted.
        self.record["tried"] = sorted(
            [*self.record["tried"], trial | {"message": member.message}], key=lambda trial: trial["lr"]
        )

    def settle(self) -> None:
        """Choose a rate once all have been tried, or add one beyond the best if that is at the edge."""
        record = self.record
        if self.settled or len(record["tried"]) < len(record["rates"]):
            return
        best = best_of(record["tried"], self.lead.l0)
        if best is None:
            record["message"] = (
                "no rate could be used: "
                + "; ".join(f"lr={named(trial['lr'])} {trial['status']}" for trial in record["tried"])
                + "; give smaller ones in lr = {tune = [...]}"
            )
            return
        beyond = _beyond(best["lr"], record["rates"])
        extended = len(record["rates"]) - record["given"]
        if beyond is not None and not self.lead.rates and extended < EXTENSIONS:
            record["rates"].append(beyond)
            return
        record["chosen"] = best["lr"]
        record["message"] = "; ".join(filter(None, [_edge(best, beyond), _far(best, self.lead.l0)]))

    def promote(self) -> None:
        """Make the chosen candidate the run of the first entry, and remove the others. Safe to repeat after a kill."""
        if not self.settled:
            return
        final = self.folder / self.lead.name
        for entry in self.candidates:
            if entry.train.lr == self.record["chosen"] and not finished(final):
                self.place(entry).rename(final)
        shutil.rmtree(self.folder / CANDIDATES / self.lead.name, ignore_errors=True)
        if (self.folder / CANDIDATES).is_dir() and not any((self.folder / CANDIDATES).iterdir()):
            (self.folder / CANDIDATES).rmdir()


def groups_of(grid: Grid, cache: ActivationCache, record: dict[str, Any], folder: Path) -> list[Group]:
    """The groups of a grid whose rate is tuned. The rates to try are put into ``record`` where it has none yet."""
    by_keys: dict[str, list[Entry]] = {}
    for entry in grid.entries:
        if entry.rates is not None:
            by_keys.setdefault(entry.keys_but("seed"), []).append(entry)
    groups = []
    for entries in by_keys.values():
        known = record.setdefault("tuning", {})
        if entries[0].name not in known:
            rates = rates_for(entries[0], grid, cache)
            known[entries[0].name] = {"rates": rates, "given": len(rates), "tried": [], "chosen": None}
        groups.append(Group(entries, known[entries[0].name], folder))
    return groups


def rates_for(entry: Entry, grid: Grid, cache: ActivationCache) -> list[float]:
    """The rates to try for an entry, ascending: its own list, or multiples of what a run without a rate would take."""
    if entry.rates:
        return sorted(entry.rates)
    assert grid.tuning is not None
    default = replace(entry.train, lr=TrainConfig().lr).resolved(entry.outline(*entry.sizes(cache)), cache).lr
    assert isinstance(default, float)
    return sorted(factor * default for factor in grid.tuning.factors)


def best_of(tried: Sequence[dict[str, Any]], asked: float | None) -> dict[str, Any] | None:
    """The trial of the smallest FVU; None if no rate gave one.

    A rate with more active latents than were asked for has an advantage, so it does not take part. Where all have more,
    the one nearest to the L0 asked for is taken.
    """
    usable = [trial for trial in tried if trial["fvu"] is not None and math.isfinite(trial["fvu"])]
    if asked is not None and (fair := [trial for trial in usable if trial["l0"] <= asked * (1 + NEAR)]):
        return min(fair, key=lambda trial: trial["fvu"])
    return min(usable, key=lambda trial: trial["fvu"] if asked is None else trial["l0"], default=None)


def validation_score(cache: ActivationCache, device: Any) -> Callable[[Path], tuple[float, float]]:
    """A function that gives FVU and L0 of a run folder's SAE on the validation rows.

    Thresholds are set anew on those rows, in memory, so that all rates are compared at the L0 asked for. After few
    tokens L0 on rows other than the training sample can be a quarter off, which moves FVU more than the rate does.
    """

    def score(folder: Path) -> tuple[float, float]:
        sae = load_sae(folder).to(device)
        with sae.evaluating():
            sae.calibrate(batch.acts.to(sae.device) for batch in cache.head(split="validation"))
            sums, _ = reconstruction(sae, cache, split="validation")
        found = sums.estimates()
        return found["fvu"].value, found["l0"].value

    return score


def _at(entry: Entry, rate: float, name: str) -> Entry:
    return replace(entry, name=name, train=replace(entry.train, lr=rate), rates=None)


def _beyond(rate: float, rates: Sequence[float]) -> float | None:
    """The next rate beyond the smallest or the largest, at the same ratio as between it and its neighbour."""
    ordered = sorted(rates)
    if rate == ordered[0]:
        return rate * ordered[0] / ordered[1]
    return rate * ordered[-1] / ordered[-2] if rate == ordered[-1] else None


def _edge(best: dict[str, Any], beyond: float | None) -> str:
    if beyond is None:
        return ""
    end = "largest" if beyond > best["lr"] else "smallest"
    return f"lr={named(best['lr'])} is the {end} rate tried, so a better one may lie beyond; try {named(beyond)} too"


def _far(best: dict[str, Any], asked: float | None) -> str:
    if asked is None or best["l0"] <= asked * (1 + NEAR):
        return ""
    l0 = f"{best['l0']:.3g} on validation tokens"
    return f"no rate came to l0={asked:g}; the nearest, lr={named(best['lr'])}, has {l0}"
