"""The tasks of ``saelab evaluate --tasks``: probing, causal tasks, absorption and two-sidedness, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, near_matches
from saelab.evaluation.reconstruction import Progress, check_pair
from saelab.evaluation.same_model import check_same_model, plain_route, reading_site
from saelab.evaluation.tasks import passages as labelled
from saelab.evaluation.tasks import probe_sets, scr_tpp, two_sided
from saelab.evaluation.tasks.absorption import absorption, first_words
from saelab.evaluation.tasks.labels import label_task
from saelab.evaluation.tasks.probing import sparse_probing
from saelab.lm.tokens import token_ids
from saelab.sae import SAE

ON_PASSAGES = ("probing", "scr", "tpp")
ON_ALL = ("two-sided", "labels", "sae-probes")  # which do not read the held-out rows alone


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks, and on what."""

    tasks: tuple[str, ...] = ()
    """Any of probing, sae-probes, labels, absorption, two-sided; and, against the advice of an audit, scr and tpp."""
    labels: Path | None = None
    """Labelled .jsonl (a key text and one or more labels a line) for probing, scr and tpp. By default passages of the
    cache's own text, labelled by article and by whether a year is written in them."""
    columns: tuple[str, ...] = ()
    """Labels to use, by default all; scr takes the first two."""
    passage_tokens: int = 32
    """Tokens of a passage cut from the cache's own text."""
    task_tokens: int = 100_000
    """Rows of the cache that two-sidedness and labels are judged on."""
    task_split: Literal["held_out", "all"] = "held_out"
    """Rows that passages and words of the cache's own text are taken from; all includes what the SAE was trained on."""
    probe_sets: tuple[str, ...] = ()
    """Sets of the package sae-probes for the task sae-probes, by name or number; by default its 113 binary ones."""
    probe_seeds: int = 3
    """Splits of each of these sets, over which the interval is taken."""
    min_letters: int = 20
    """Letters that the model must spell for absorption to be measured (SAEBench: 20)."""

    def __post_init__(self) -> None:
        names = tuple(name for entry in self.tasks for name in entry.split(",") if name)
        object.__setattr__(self, "tasks", names)
        for name in ("columns", "probe_sets"):
            parts = tuple(n for entry in getattr(self, name) for n in entry.split(",") if n)
            object.__setattr__(self, name, parts)
        for name in names:
            if name not in TASKS:
                raise UserError(f"unknown task {name!r}: {near_matches(name, TASKS)}")
        for name in ("passage_tokens", "task_tokens", "min_letters", "probe_seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.labels is not None and not set(names) & set(ON_PASSAGES):
            raise UserError(f"labels serve the tasks {', '.join(ON_PASSAGES)}; add one of them to tasks")


@dataclass
class _TaskData:
    """The data that the tasks share; passages are read and encoded once."""

    sae: SAE
    cache: ActivationCache
    model: Any
    config: TaskConfig
    seed: int
    any_weights: bool = False
    shared: dict[str, Any] = field(default_factory=dict)
    passages: labelled.Passages | None = None
    pooled: labelled.Pooled | None = None

    def labelled(self) -> tuple[labelled.Pooled, labelled.Passages, list[str]]:
        if self.passages is None or self.pooled is None:
            self.passages = self._read()
            self.pooled = labelled.pool(self.sae, self.passages)
        columns = list(self.config.columns) or list(self.passages.labels)
        for name in columns:
            self.passages.column(name)
        return self.pooled, self.passages, columns

    def _read(self) -> labelled.Passages:
        if self.config.labels is None:
            size, split = self.config.passage_tokens, self.config.task_split
            return labelled.from_cache(self.cache, _decoder(self.cache), passage_tokens=size, split=split)
        texts, labels = labelled.read_jsonl(self.config.labels)
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            raise UserError(
                f"{self.config.labels} needs the language model and its tokenizer to run through; give the model, or "
                "leave labels out to use the cache's own text"
            )
        plain = plain_route(self.model, self.cache)[0]
        site = reading_site(self.model, plain, self.cache)
        check_same_model(plain, site, self.cache, *next(iter(self.cache.contexts("all"))), self.any_weights)
        bos = self.cache.manifest.bos != "none"

        return labelled.from_texts(
            plain, site, lambda text: token_ids(tokenizer, text, bos), texts, labels, source=str(self.config.labels),
            max_tokens=max(self.cache.manifest.context_length, 2),
            skip_first=max(self.cache.manifest.skip_first, int(bos)),
        )  # fmt: skip


def run_tasks(
    sae: SAE,
    cache: ActivationCache,
    config: TaskConfig,
    model: Any = None,
    *,
    seed: int = 0,
    any_weights: bool = False,
    progress: Progress | None = None,
    shared: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Each named task's results, ready for JSON.

    ``model`` is the language model of the cache, as :func:`saelab.load_model` gives it, or with ``any_weights`` one of
    its kind; a labelled file and sae-probes need it. ``shared`` keeps what the next SAE on the same model can use.
    Raises UserError, which says what to do, where labels or text do not suffice for a task.
    """
    check_pair(sae, cache, "all")
    data, results = _TaskData(sae, cache, model, config, seed, any_weights, {} if shared is None else shared), {}
    with sae.evaluating():
        for done, name in enumerate(config.tasks):
            if progress is not None:
                progress("tasks", done, len(config.tasks))
            if sae.transcodes and name in ON_THE_INPUT:
                raise UserError(
                    f"{name} compares dictionary rows with what the SAE reads, and a transcoder's lie elsewhere; leave "
                    "it out of --tasks"
                )
            try:
                results[name] = TASKS[name](data)
            except UserError as error:
                if config.labels is not None or config.task_split == "all" or name in ON_ALL:
                    raise
                raise UserError(
                    f"{error}. Held-out rows were read; --task-split all adds those that the SAE was trained on"
                ) from error
        if progress is not None and config.tasks:
            progress("tasks", len(config.tasks), len(config.tasks))
    return results


def _probing(data: _TaskData) -> dict[str, Any]:
    pooled, passages, columns = data.labelled()
    found = {name: sparse_probing(pooled, passages, name, seed=data.seed) for name in columns}
    return {name: {metric: e.row() for metric, e in rows.items()} for name, rows in found.items()}


def _tpp(data: _TaskData) -> dict[str, Any]:
    pooled, passages, columns = data.labelled()
    several = [name for name in columns if data.config.columns or len(set(passages.labels[name])) > 2]
    if not several:
        raise UserError(f"tpp needs a label of three classes or more; {passages.source} has {', '.join(columns)}")
    return {name: scr_tpp.tpp(pooled, passages, name, seed=data.seed) for name in several}


def _scr(data: _TaskData) -> dict[str, Any]:
    pooled, passages, columns = data.labelled()
    if len(columns) < 2:
        raise UserError(f"scr needs two labels; {passages.source} offers {', '.join(columns)}: add a second label")
    a, b = columns[:2]
    found = scr_tpp.scr_over_classes(pooled, passages.column(a), passages.column(b), seed=data.seed)
    return {f"{a} / {b}": found}


def _absorption(data: _TaskData) -> dict[str, Any]:
    strings = _vocabulary(data.cache)
    acts, words = first_words(data.cache, strings, split=data.config.task_split)
    return absorption(data.sae, acts, words, seed=data.seed, min_letters=data.config.min_letters)


def _sae_probes(data: _TaskData) -> dict[str, Any]:
    folder = probe_sets.data_folder()
    names = probe_sets.chosen_sets(folder, data.config.probe_sets)
    tokenizer = getattr(data.model, "tokenizer", None)
    if tokenizer is None:
        raise UserError("the task sae-probes runs prompts through the language model and its tokenizer; give the model")
    key = f"sae-probes {id(data.model)} {data.cache.hook_name}"
    if key not in data.shared:
        plain = plain_route(data.model, data.cache)[0]
        site = reading_site(data.model, plain, data.cache)
        check_same_model(plain, site, data.cache, *next(iter(data.cache.contexts("all"))), data.any_weights)
        bos, found = data.cache.manifest.bos != "none", {}
        for name in names:
            one = probe_sets.read_set(folder, name)
            acts = probe_sets.last_activations(plain, site, lambda text: token_ids(tokenizer, text, bos), one.prompts)
            found[name] = acts, one.labels
        data.shared[key] = found
    seeds = range(probe_sets.FIRST_SEED, probe_sets.FIRST_SEED + data.config.probe_seeds)
    return probe_sets.probe_sets(data.sae, data.shared[key], seeds=seeds)


def _labels(data: _TaskData) -> dict[str, Any]:
    return label_task(data.sae, data.cache, data.config.task_tokens)


def _two_sided(data: _TaskData) -> dict[str, Any]:
    firings = two_sided.collect(data.sae, data.cache, data.config.task_tokens)
    found = two_sided.two_sidedness(data.sae, firings, data.seed, readout=_readout(data.model))
    return {name: e.row() for name, e in found.items()}


ON_THE_INPUT = ("scr", "tpp", "absorption")  # they subtract latents from the activations, or project on them
TASKS: dict[str, Callable[[_TaskData], dict[str, Any]]] = {
    "probing": _probing,
    "scr": _scr,
    "tpp": _tpp,
    "absorption": _absorption,
    "two-sided": _two_sided,
    "labels": _labels,
    "sae-probes": _sae_probes,
}


def _decoder(cache: ActivationCache) -> Callable[[list[int]], str] | None:
    """Token ids to text by the vocabulary stored with the cache; None without one."""
    return (lambda ids: "".join(cache.token_strings(ids))) if cache.n_vocabulary else None


def _vocabulary(cache: ActivationCache) -> list[str]:
    if not cache.n_vocabulary:
        raise UserError(f"{cache.path} has no vocabulary, so its words are unknown; harvest it from a language model")
    return list(cache.vocabulary)


def _readout(model: Any) -> torch.Tensor | None:
    """The linear map from a direction at the hook to logits, up to the norm's division; None without a loaded model.

    A LayerNorm subtracts the direction's mean: then the mean of each column is subtracted here.
    """
    if not hasattr(model, "original_model"):
        return None
    from saelab.lm.unembed import unembedding

    found = unembedding(model)
    matrix = found.weight if found.norm_weight is None else found.norm_weight[:, None] * found.weight
    return matrix - matrix.mean(0, keepdim=True) if found.centred else matrix
