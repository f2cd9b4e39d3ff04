"""A folder of work: which runs, caches and recipes lie below it, and what each run's numbers say.

Nothing outside the folder is opened: names are resolved first, links included.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, damaged, near_matches
from saelab.layout import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EXAMPLES,
    EXPLANATIONS,
    FEATURES,
    INDEX,
    MANIFEST,
    METRICS,
    RECIPE,
    RUN,
    SWEEP_TABLE,
    WEIGHTS,
)
from saelab.sae import SAE
from saelab.sae.weights import load_sae
from saelab.workspace import foreign
from saelab.workspace.metrics_log import read_metrics


@dataclass(frozen=True)
class Run:
    """One SAE's folder. ``name`` is its path below the workspace, with ``/``."""

    name: str
    path: Path

    @property
    def stamp(self) -> tuple[float, ...]:
        """Modification times of what a reader caches; changes when the run does."""
        files = (CONFIG, *foreign.TELLING, METRICS, EVALUATION, f"{INDEX}/{FEATURES}", EXPLANATIONS)
        return tuple(_mtime(self.path / name) for name in files)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``cfg.json``, or nothing while the first save is still to come; of another tool's SAE, what it would say.

        A file that cannot be read gives ``{"error": ...}``: one damaged run must not hide the others.
        """
        try:
            own = _read_json(self.path / CONFIG)
        except UserError as error:
            return {"error": str(error)}
        if "saelab" in (own.get("metadata") or {}):
            return own
        names = {path.name for path in self.path.iterdir()}
        return foreign.configuration(self.path) if foreign.looks_foreign(names) else own

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Provenance. Where another tool recorded no model or hook point, those of the index's cache are taken."""
        known = self.config.get("metadata") or {}
        if not self.is_foreign or not self.has_index:
            return known
        from saelab.features import FeatureIndex

        meta = FeatureIndex(self.path).meta
        seen = {
            "model_name": meta.get("model"),
            "hook_name": meta.get("hook_name"),
            "cache_fingerprint": meta.get("cache_fingerprint"),
        }
        return {**{name: value for name, value in seen.items() if value}, **known}

    @property
    def is_foreign(self) -> bool:
        """Whether another tool wrote it."""
        return "format" in self.config

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """``evaluation.json``, or nothing before ``saelab evaluate``."""
        return _read_json(self.path / EVALUATION)

    @cached_property
    def last_step(self) -> dict[str, Any]:
        """The last complete line of ``metrics.jsonl``."""
        rows = read_metrics(self.path / METRICS, tail=4096)
        return rows[-1] if rows else {}

    @property
    def has_weights(self) -> bool:
        """Whether the first save is done."""
        return self.is_foreign or ((self.path / WEIGHTS).is_file() and "d_sae" in self.config)

    @property
    def has_index(self) -> bool:
        """Whether the index is complete: its two tables exist."""
        folder = self.path / INDEX
        return all((folder / name).is_file() for name in (FEATURES, EXAMPLES))

    @property
    def variant(self) -> str:
        """Registry name, or another tool's name of the architecture."""
        return (self.metadata.get("saelab") or {}).get("variant") or self.config.get("architecture") or "unknown"

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as far as the configuration tells."""
        return (self.metadata.get("saelab") or {}).get("config") or self.config

    @property
    def d_sae(self) -> int | None:
        """Latents; None while the configuration is not there."""
        return self.config.get("d_sae")

    def load(self) -> SAE:
        """The SAE in eval mode, taking raw activations; folders of other tools are converted while loading."""
        if not self.is_foreign:
            return load_sae(self.path)
        from saelab.interop import load

        return load(self.path)


@dataclass(frozen=True)
class Workspace:
    """The folder given to ``saelab app`` and what is below it, at the time of the scan."""

    root: Path
    runs: dict[str, Run] = field(default_factory=dict)
    caches: dict[str, Path] = field(default_factory=dict)
    sweeps: dict[str, Path] = field(default_factory=dict)
    """Folders that hold the table of a finished sweep."""

    @classmethod
    def scan(cls, root: Path | str) -> Workspace:
        """Look for run folders (weights of any tool, or a ``metrics.jsonl``), caches and sweeps, at any depth."""
        root = Path(root).resolve()
        if not root.is_dir():
            raise UserError(f"{root} is no folder; name the folder that holds your runs")
        runs, caches, sweeps = {}, {}, {}
        for folder, files in _walk(root):
            name = folder.relative_to(root).as_posix()
            if RECIPE in {*files, *(p.name for p in folder.parent.glob(RECIPE))}:
                continue  # the SAEs inside a recipe belong to it
            if SWEEP_TABLE in files:
                sweeps[name] = folder
            if foreign.looks_foreign(files) or METRICS in files:
                runs[name] = Run(name, folder)
            elif MANIFEST in files:
                caches[name] = folder
        return cls(root, *(dict(sorted(found.items())) for found in (runs, caches, sweeps)))

    def run(self, name: str) -> Run:
        """The run called ``name``."""
        if name not in self.runs:
            raise UserError(
                f"no run {name!r} below {self.root}: {near_matches(name, self.runs) if self.runs else 'no runs'}"
            )
        return self.runs[name]

    def inside(self, path: Path | str) -> Path:
        """``path`` (relative to the folder, or absolute) resolved; refused when it leads out of the folder."""
        resolved = (self.root / path).resolve()
        if not resolved.is_relative_to(self.root):
            raise UserError(f"{path} lies outside {self.root}; only files below it are opened")
        return resolved

    def cache_of(self, run: Run) -> ActivationCache | None:
        """The cache a run was trained on, if it (or one with its fingerprint) lies below the folder."""
        wanted = run.metadata.get("cache_fingerprint")
        for folder in self.caches.values():
            try:
                cache = ActivationCache(folder)
            except (UserError, OSError):
                continue  # a cache still being written is no answer to this question
            if wanted is not None and cache.fingerprint == wanted:
                return cache
        return None

    def model_of(self, run: Run) -> str | None:
        """The model a run's metadata may name without asking: the demo model, or a folder below the workspace."""
        name = run.metadata.get("model_name")
        if not name:
            return None
        if name == "smollm2":
            return name
        folder = (self.root / name).resolve()
        return str(folder) if folder.is_relative_to(self.root) and (folder / "config.json").is_file() else None


def _walk(root: Path) -> Iterator[tuple[Path, set[str]]]:
    for folder, folders, files in os.walk(root, followlinks=False):
        # Intermediate checkpoints are states of their run, not runs; a folder of that name elsewhere is one of many.
        inner = {INDEX, CHECKPOINTS} if {METRICS, RUN, "hyperparams.json"} & {*files} else {INDEX}
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in inner)
        yield Path(folder), {name for name in files if not (Path(folder) / name).is_symlink()}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with damaged(path, "write the run again"):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("it holds no JSON object")
        return content


def _mtime(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
