"""How well offline labels say where latents fire: ``python -m saelab.bench.labels RUN... --cache CACHE``.

Reads the labels as a person does, from their text in the feature index, and predicts with them on the half of the
contexts that no label was chosen on. Whatever made the labels, these figures can be compared.

``f1``: of tokens, every firing counted alike; ``f1_mass``: every firing counted by its magnitude over the mean;
``detection``: balanced accuracy of telling windows of 32 tokens in which the latent fires from those in which it does
not; ``detection_strong``: the same, of the quarter of the firing windows with the largest activations; ``strongest``:
the share of the ten strongest contexts whose peak the label names. Means over all latents that fire on 8 tokens of the
half or more; a latent without a label has f1 0 and detection 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from saelab.bench import command
from saelab.bench.timing import write_out
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation.reconstruction import check_pair
from saelab.features.index import FeatureIndex
from saelab.features.indexing.corpus import Corpus
from saelab.features.indexing.labels import MIN_FIRINGS, REACH, half_of, parse_label, visible
from saelab.runs import Run

WINDOW, STRONGEST = 32, 10
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """Which runs, over which text."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders with a feature index."""
    cache: Path
    """The cache that the indexes were built on."""
    out: Path | None = None
    """JSON file to write: means, and the figures of every latent."""


class Firings(NamedTuple):
    """Where one pole of a latent fires on the held-out half: rows in ascending order, and magnitudes."""

    rows: Rows
    sizes: NDArray[np.float32]


class Reader:
    """Says on which rows of the held-out half a label predicts its latent to fire."""

    def __init__(self, cache: ActivationCache, folder: Path) -> None:
        self.corpus = corpus = Corpus(cache, folder, cache.n_rows)
        vocabulary = cache.vocabulary
        names = corpus.name_parts(vocabulary, [vocabulary.alone(n) for n in range(len(vocabulary))])
        rows = np.arange(corpus.n_rows)
        self.held_out = half_of(corpus.contexts(rows)) == 1
        window = corpus.windows(rows, 1, 1)
        units = np.where(window.inside, corpus.units[window.places], len(names))
        texts = np.array([*names, ""], object)
        self.words: dict[str, Any] = dict(zip(("after", "token", "before"), texts[units].T))
        self.words["phrase"] = self.words["after"] + self.words["token"]
        self.found = {kind: self._by_word(kind, rows) for kind in self.words}
        self.window = corpus.contexts(rows) * WINDOW + corpus.positions[corpus.place_of[rows]] // WINDOW
        self.window = np.unique(self.window, return_inverse=True)[1]
        self.windows = np.unique(self.window[self.held_out])

    def _by_word(self, kind: str, rows: Rows) -> dict[str, Rows]:
        shown = np.array([visible(word) for word in self.words[kind]], object)
        words, inverse = np.unique(shown.astype(str), return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        cuts = np.searchsorted(inverse[order], np.arange(1, len(words)))
        return dict(zip(words.tolist(), np.split(rows[order], cuts)))

    def predicted(self, label: str) -> Rows:
        """The rows, ascending."""
        kind, words = parse_label(label)
        own = self.found["token" if kind == "near" else kind]
        hits = np.concatenate([own.get(word, np.empty(0, np.int64)) for word in words])
        if kind == "near":
            contexts = self.corpus.contexts(hits)
            reach = hits[:, None] + np.arange(REACH)
            reach = reach.clip(0, self.corpus.n_rows - 1)
            hits = reach[self.corpus.contexts(reach.ravel()).reshape(reach.shape) == contexts[:, None]]
        hits = np.unique(hits)
        return hits[self.held_out[hits]]


def score(reader: Reader, label: str, firings: Firings) -> dict[str, float]:
    """The figures of one label."""
    if not label:
        return {"f1": 0.0, "f1_mass": 0.0, "detection": 0.5, "detection_strong": 0.5, "strongest": 0.0}
    said, weight = reader.predicted(label), firings.sizes / firings.sizes.mean()
    right = np.isin(firings.rows, said)
    n, hits, mass = len(weight), int(right.sum()), float(weight[right].sum())
    wrong = len(said) - hits
    windows, inverse = np.unique(reader.window[firings.rows], return_inverse=True)
    peak = np.zeros(len(windows))
    np.maximum.at(peak, inverse, firings.sizes)
    called = np.unique(reader.window[said])
    silent = len(reader.windows) - len(windows)
    rejected = 1 - len(np.setdiff1d(called, windows)) / max(silent, 1)
    strong = windows[peak >= np.quantile(peak, 0.75)]
    inverse = np.unique(reader.corpus.contexts(firings.rows), return_inverse=True)[1]
    order = np.lexsort((-firings.sizes, inverse))
    best = order[np.diff(inverse[order], prepend=-1) > 0]  # the strongest firing of each context
    best = best[np.argsort(-firings.sizes[best])][:STRONGEST]
    return {
        "f1": 2 * hits / (len(said) + n),
        "f1_mass": 2 * mass / (mass + wrong + n),
        "detection": (float(np.isin(windows, called).mean()) + rejected) / 2,
        "detection_strong": (float(np.isin(strong, called).mean()) + rejected) / 2,
        "strongest": float(right[best].mean()),
    }


def firings_of(run: Run, cache: ActivationCache, keep: NDArray[np.bool_]) -> dict[tuple[int, int], Firings]:
    """Firings of every (latent, pole) on the rows of ``keep``."""
    rows, slots, sizes, at = [], [], [], 0
    sae = run.sae
    check_pair(sae, cache, "all")
    with sae.evaluating():
        for batch in cache.head(cache.n_rows, 2048):
            code = sae.encode(batch.acts).detach().nonzero()
            values = code.values.float().numpy()
            own = np.repeat(np.arange(at, at + code.n), np.diff(code.row_ptr.numpy()))
            use = keep[own]
            rows.append(own[use])
            slots.append((2 * code.indices.numpy() + (values < 0))[use])
            sizes.append(np.abs(values)[use])
            at += code.n
    row, slot, size = (np.concatenate(part) for part in (rows, slots, sizes))
    order = np.argsort(slot, kind="stable")
    numbers, cuts = np.unique(slot[order], return_index=True)
    parts = zip(*(np.split(column[order], cuts[1:]) for column in (row, size)))
    return {(int(n) // 2, 1 - 2 * (int(n) % 2)): Firings(*part) for n, part in zip(numbers, parts)}


def measure(run: Run, cache: ActivationCache, reader: Reader) -> dict[tuple[int, int], dict[str, float]]:
    """The figures of every (latent, pole) that fires often enough."""
    table = FeatureIndex(str(run.path)).table()
    labels = dict(zip(zip(table["latent"], table["pole"]), table["label"].fillna("")))
    fired = firings_of(run, cache, reader.held_out)
    found = {key: score(reader, labels[key], f) for key, f in fired.items() if len(f.rows) >= MIN_FIRINGS}
    if not found:
        raise UserError(f"no latent of {run.name} fires {MIN_FIRINGS} times in half of the cache; take a longer one")
    return found


def means(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """Means over latents, and the shares of poor ones."""
    rows = list(found)
    out = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    out["f1_below_0.3"] = float(np.mean([row["f1"] < 0.3 for row in rows]))
    out["names_no_peak"] = float(np.mean([row["strongest"] == 0 for row in rows]))
    return out | {"latents": len(rows)}


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = command.options(Options, "labels", __doc__, args)
    cache, found = ActivationCache(options.cache), {}
    with TemporaryDirectory() as folder:
        reader = Reader(cache, Path(folder) / "corpus")
        for path in options.runs:
            each = measure(Run.open(path), cache, reader)
            rows = [{"latent": latent, "pole": pole, **row} for (latent, pole), row in each.items()]
            found[str(path)] = {**means(each.values()), "each": rows}
    table = Table("run", *(name for name in next(iter(found.values())) if name != "each"))
    for name, row in found.items():
        table.add_row(name, *(f"{value:.3g}" for key, value in row.items() if key != "each"))
    write_out(options.out, found)
    Console().print(table)


if __name__ == "__main__":
    command.run(main)
