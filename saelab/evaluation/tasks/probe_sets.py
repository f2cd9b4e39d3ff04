"""k-sparse probing on the 113 binary sets of the package ``sae-probes`` (Kantamneni et al., 2025, arXiv 2502.16681).

The audit of SAE benchmarks (Chanin, 2026, arXiv 2605.18229) found this the most reliable of them. The package holds
the sets in its wheel, so nothing is downloaded: ``pip install --no-deps sae-probes`` (its requirements pin older
releases of libraries that are not used here; its code is not run). Protocol and numbers are the package's: activations
under the last token of a prompt; at most 1,024 balanced training prompts; the k latents whose class means differ most,
latents divided by their mean firing; a logistic regression whose C is chosen on the last training prompts; accuracy,
weighted F1 and AUC on the rest. A split, and so a score, depends on a seed: intervals are Student's over seeds.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import torch
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from saelab.errors import UserError, damaged, near_matches
from saelab.evaluation.tasks.probing import fitted
from saelab.lm.limits import position_limit
from saelab.lm.offload import device_of
from saelab.lm.sites import Site
from saelab.lm.structure import Reached
from saelab.metrics.intervals import Estimate, t_interval
from saelab.sae import SAE

KS = (1, 2, 4, 8, 16)
FIRST_SEED = 42  # the package's
TRAIN, LEFT, MOST = 1024, 100, 5000  # most training prompts, prompts left over at least, prompts read of a set
MAX_TOKENS = 1024
CS = np.logspace(5, -5, 10)
METRICS = ("auc", "accuracy", "f1")
PAGE = 16  # prompts of a forward pass

Activations = Float[np.ndarray, "prompts d_in"]


class ProbeSet(NamedTuple):
    """Prompts and whether each is of the second class, by the sorted names of the two classes."""

    name: str
    prompts: list[str]
    labels: np.ndarray


@dataclass(frozen=True)
class Split:
    """Prompt numbers of the two parts."""

    train: np.ndarray
    test: np.ndarray


def data_folder() -> Path:
    """Where the installed package keeps its sets. UserError, with the remedy, where it is not installed."""
    found = importlib.util.find_spec("sae_probes")
    places = [] if found is None else list(found.submodule_search_locations or ())
    folder = Path(places[0]) / "data" if places else None
    if folder is None or not folder.is_dir():
        raise UserError("the task sae-probes reads the sets of that package: pip install --no-deps sae-probes")
    return folder


def set_names(folder: Path) -> list[str]:
    """The binary sets in the package's order, such as ``5_hist_fig_ismale``."""
    path = folder / "probing_datasets_MASTER.csv.zst"
    with damaged(path, "install sae-probes again", pa.ArrowException, OSError):
        rows = _table(path, ("Data type", "Dataset save name"))
        return [
            Path(name).name.split(".")[0]
            for kind, name in zip(rows["Data type"], rows["Dataset save name"])
            if kind == "Binary Classification"
        ]


def read_set(folder: Path, name: str) -> ProbeSet:
    """One set, its first 5,000 prompts. UserError for one with other than two classes."""
    path = folder / "cleaned_data" / f"{name}.csv.zst"
    with damaged(path, "install sae-probes again", pa.ArrowException, OSError):
        rows = _table(path, ("prompt", "target"))
    classes = sorted(set(rows["target"]))
    if len(classes) != 2:
        raise UserError(f"{name} has {len(classes)} classes ({', '.join(classes[:3])}); a probe needs two")
    return ProbeSet(name, rows["prompt"][:MOST], np.array([row == classes[1] for row in rows["target"][:MOST]]))


def _table(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    table = pa_csv.read_csv(
        pa.input_stream(str(path), compression="zstd"),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())
        ),
    )
    return {name: table[name].to_pylist() for name in columns}


def chosen_sets(folder: Path, wanted: Sequence[str]) -> list[str]:
    """The names of the sets asked for, by name or by number; all by default."""
    known = set_names(folder)
    by_number = {name.split("_")[0]: name for name in known}
    for name in wanted:
        if name not in known and name not in by_number:
            raise UserError(f"sae-probes has no binary set {name!r}: {near_matches(name, known)}")
    return [by_number.get(name, name) for name in wanted] or known


@torch.no_grad()
def last_activations(
    model: nn.Module, site: Site, encode: Callable[[str], list[int]], prompts: Sequence[str]
) -> Activations:
    """Activations at ``site`` under the last token of each prompt, of which ``encode`` gives the token ids. Of more
    than 1,024 tokens, or than the model has positions, the first, which may be BOS, and the last ones are run."""
    whole, (limit, is_table) = [encode(prompt) for prompt in prompts], position_limit(model)
    most = MAX_TOKENS if limit is None or not is_table else min(MAX_TOKENS, limit)
    ids = [row if len(row) <= most else [row[0], *row[1 - most :]] for row in whole]
    if short := [number for number, row in enumerate(ids) if not row]:
        raise UserError(f"prompt {short[0] + 1} has no token; the tokenizer does not fit")
    order, rows = sorted(range(len(ids)), key=lambda i: len(ids[i])), {}
    for start in range(0, len(order), PAGE):
        part = order[start : start + PAGE]
        length = max(len(ids[i]) for i in part)
        # Padding follows the text, where a causal model cannot see it from the last token.
        tokens = torch.tensor([ids[i] + [ids[i][-1]] * (length - len(ids[i])) for i in part])
        seen: list[Tensor] = []

        def keep(hidden: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(hidden.float().cpu())
            raise Reached

        with site.register(model, keep), contextlib.suppress(Reached):
            model(input_ids=tokens.to(device_of(model)), use_cache=False)
        for place, i in enumerate(part):
            rows[i] = seen[0][place, len(ids[i]) - 1]
    return torch.stack([rows[i] for i in range(len(ids))]).numpy()


def split(labels: np.ndarray, seed: int) -> Split:
    """A balanced training part of at most 1,024 prompts, and a balanced test part of the rest."""
    n = len(labels)
    n_train = min(n - LEFT, TRAIN)
    n_test = n - n_train - 1
    if n_train < 4:
        raise UserError(f"a set of {n} prompts is too small: {LEFT} are left for the test")
    rng = np.random.RandomState(seed)
    sides, parts = (np.flatnonzero(labels), np.flatnonzero(~labels)), []
    for size, taken in ((n_train, None), (n_test, "rest")):
        counts = -(-size // 2), size - -(-size // 2)
        pools = sides if taken is None else tuple(np.setdiff1d(s, p) for s, p in zip(sides, parts[0]))
        if any(len(pool) < count for pool, count in zip(pools, counts)):
            raise UserError(f"a set of {len(sides[0])} and {len(sides[1])} prompts cannot be divided in balance")
        parts.append([rng.choice(pool, size=count, replace=False) for pool, count in zip(pools, counts)])
    return Split(*(rng.permutation(np.concatenate(part)) for part in parts))


def ranked(z: Float[np.ndarray, "n m"], y: np.ndarray) -> np.ndarray:
    """Columns by the absolute difference of class means, each column in units of its mean magnitude where it fires."""
    firing = (z != 0).sum(0)
    scaled = z / (np.abs(z).sum(0) / (firing + 1e-6) + 1e-6)
    return np.argsort(-np.abs(scaled[y].mean(0) - scaled[~y].mean(0)), kind="stable")


def probe(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, seed: int) -> dict[str, float]:
    """Test metrics of a logistic regression whose C is chosen on validation prompts of the training part."""
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    scores = [np.mean([_validate(x, y, part, float(C)) for part in _folds(x, y, seed)]) for C in CS]
    shuffled = np.random.RandomState(seed).permutation(len(x))
    model = fitted(x[shuffled], y[shuffled], C=float(CS[int(np.argmax(scores))]))
    said = model.predict(x_test)
    return {
        "auc": float(roc_auc_score(y_test, model.predict_proba(x_test)[:, 1])),
        "accuracy": float(accuracy_score(y_test, said)),
        "f1": float(f1_score(y_test, said, average="weighted")),
    }


def _folds(x: np.ndarray, y: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import LeavePOut, StratifiedKFold

    n = len(x)
    if n >= 128:
        size = min(int(0.2 * n), 100)
        return [(np.arange(n - size), np.arange(n - size, n))]
    folds = LeavePOut(2) if n <= 12 else StratifiedKFold(6, shuffle=True, random_state=seed)
    return [(a, b) for a, b in folds.split(x, y) if len(set(y[b])) == 2]


def _validate(x: np.ndarray, y: np.ndarray, fold: tuple[np.ndarray, np.ndarray], C: float) -> float:
    from sklearn.metrics import roc_auc_score

    train, held = fold
    if len(set(y[train])) < 2:
        return 0.5
    return float(roc_auc_score(y[held], fitted(x[train], y[train], C=C).predict_proba(x[held])[:, 1]))


def probe_sets(
    sae: SAE,
    activations: Mapping[str, tuple[Activations, np.ndarray]],
    ks: Sequence[int] = KS,
    seeds: Sequence[int] = range(FIRST_SEED, FIRST_SEED + 3),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Test metrics of the SAE's k best latents and of the k best channels, means over sets with intervals over seeds.

    ``activations[set]`` are those of the set's prompts and their labels.
    """
    found: dict[str, np.ndarray] = {}  # [sets, seeds] by name
    details: dict[str, dict[str, float]] = {}
    for number, (name, (x, labels)) in enumerate(activations.items()):
        z, rows = encode(sae, x), []
        for seed in seeds:
            with threadpool_limits(limits=1):
                rows.append(_scores(z, x, labels, split(labels, seed), ks, seed))
        details[name] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        for key in rows[0]:
            own = np.array([[row[key] for row in rows]])
            found[key] = own if number == 0 else np.concatenate([found[key], own])
        if progress is not None:
            progress(number + 1, len(activations))
    return {"means": {key: _estimate(key, values).row() for key, values in found.items()}, "by_set": details}


def _scores(
    z: np.ndarray, x: np.ndarray, labels: np.ndarray, parts: Split, ks: Sequence[int], seed: int
) -> dict[str, float]:
    y, y_test, out = labels[parts.train], labels[parts.test], {}
    for side, columns in (("sae", z), ("channels", x)):
        order = ranked(columns[parts.train], y)
        for k in ks:
            own = order[:k]
            scores = probe(columns[parts.train][:, own], y, columns[parts.test][:, own], y_test, seed)
            out |= {f"{side}_top_{k}_{metric}": scores[metric] for metric in METRICS}
    return out


def _estimate(key: str, values: np.ndarray) -> Estimate:
    n_sets, n_seeds = values.shape
    by_seed = values.mean(0)
    low, high = t_interval(by_seed) if n_seeds > 1 else (None, None)
    how = f"95 % Student's interval over {n_seeds} splits" if n_seeds > 1 else "none: cannot say from one split"
    formula = (
        f"test {key.rsplit('_', 1)[1]} of a logistic regression on {key.rsplit('_', 1)[0]}, mean over {n_sets} sets"
    )
    return Estimate(float(by_seed.mean()), low, high, n_sets, "set", formula, how)


@torch.no_grad()
def encode(sae: SAE, x: Activations, batch_size: int = 4096) -> Float[np.ndarray, "prompts d_sae"]:
    """The codes, dense; latents that fire on no prompt are columns of zeros."""
    codes = [sae.features(sae.encode(part.to(sae.device))) for part in torch.from_numpy(x).split(batch_size)]
    return torch.cat([code.to("cpu").dense() for code in codes]).numpy()
