"""``Run``: one trained SAE of any tool, with everything that its files record."""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saelab.errors import UserError, damaged
from saelab.files import url_of
from saelab.interop.collections import model_on_hub, on_hub
from saelab.interop.detection import detect, find_format, is_ours, read
from saelab.interop.fetch import PREFIX, full_name, resolve
from saelab.interop.foreign import Foreign
from saelab.interop.formats import FORMATS
from saelab.layout import (
    CHECKPOINTS,
    CONFIG,
    CONTROLS,
    EVALUATION,
    EXAMPLES,
    EXPLANATIONS,
    FEATURES,
    INDEX,
    LABELS,
    METRICS,
    RECIPE,
    RUN,
    WEIGHTS,
)
from saelab.runs.metrics_log import read_metrics
from saelab.sae import SAE
from saelab.sae.normalised import KINDS
from saelab.sae.weights import load_sae, tensors_hash

if TYPE_CHECKING:
    from saelab.features import FeatureIndex


class Run:
    """One trained SAE and its files. Weights, measurements and the feature index are read on first use.

    ``Run.open`` opens a run folder, another tool's file or folder, or a hub id; ``Run.scan`` finds all SAEs below a
    folder. ``Run(sae, hook_name)`` wraps an SAE in memory that was never saved.

    Attributes:
        path: Its folder or file; None for an SAE in memory.
        name: In a scan its path relative to the scanned folder, with ``/``; else the name of its file or folder.
        origin: Its absolute path or its hub id.
    """

    def __init__(
        self,
        sae: SAE | None = None,
        hook_name: str = "",
        *,
        path: Path | str | None = None,
        name: str = "",
        origin: str = "",
        model_name: str | None = None,
        rms_norm: float | None = None,
        hook_name_out: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if (sae is None) == (path is None):
            raise UserError("a Run is either an SAE in memory or the path of one; use Run.open for a path")
        self.path = None if path is None else Path(path)
        self.name = name or (self.path.name if self.path is not None else "")
        self.origin = origin or (str(self.path.resolve()) if self.path is not None else "")
        self._given = {"hook_name": hook_name, "model_name": model_name, "rms_norm": rms_norm}
        self._given["hook_name_out"] = hook_name_out
        self._options = tuple(sorted((options or {}).items()))
        if sae is not None:
            self.sae = sae.eval()

    @classmethod
    def open(cls, path: Path | str, hook_name: str = "", **options: Any) -> Run:
        """The SAE at ``path``: a run folder, any file or folder that :func:`saelab.load` reads, or a hub id.

        ``hook_name`` is the hook point of the SAE and overrides what the files say. ``options`` are what a bare file
        does not record (see :func:`saelab.interop.read`). Raises UserError for a path that holds no SAE.
        """
        local = resolve(path)
        if not (is_ours(local) or (local / METRICS).is_file()):
            detect(local)
        known = PREFIX.match(str(path)) or url_of(path) or Path(path).exists() or on_hub(str(path))
        origin = full_name(path if known else f"hf://{path}")
        return cls(hook_name=hook_name, path=local, origin=origin, options=options)

    @classmethod
    def scan(cls, folder: Path | str) -> dict[str, Run]:
        """Every SAE below ``folder``, at any depth, by name: finished runs, runs in training, files of other tools."""
        return {run.name: run for place in walk(Path(folder)) for run in place.runs}

    def unread(self) -> Run:
        """The same SAE on disk with nothing read yet, for files that have changed. UserError for one in memory."""
        path = self._path
        return Run(path=path, name=self.name, origin=self.origin, options=dict(self._options), **self._given)

    @cached_property
    def sae(self) -> SAE:
        """The SAE in eval mode on raw activations. Raises UserError for what cannot be read."""
        path = self._path
        if "saelab" in (self._own.get("metadata") or {}) and not self._options:
            return load_sae(path)
        if (path / METRICS).is_file() and find_format(path) is None:
            raise UserError(f"{path} has no weights yet; wait for its first save, or continue the run with --resume")
        foreign = read(path, **dict(self._options))
        self.__dict__.setdefault("config", _description(foreign))  # so that it is not read again
        return foreign.to_sae()

    @cached_property
    def config(self) -> dict[str, Any]:
        """``cfg.json``, or nothing before the first save; for another tool's SAE the equivalent.

        A file that cannot be read gives ``{"error": ...}``: one damaged run must not hide the others.
        """
        if self.path is None:
            return {"architecture": self.sae.variant, "d_in": self.sae.d_in, "d_sae": self.sae.d_sae}
        try:
            if "saelab" in (self._own.get("metadata") or {}) and not self._options:
                return self._own
            if find_format(self.path) is None:
                return self._own
            return dict(_read_description(self.path, self._stamp_of_weights, self._options))
        except UserError as error:
            return {"error": str(error)}

    @property
    def is_foreign(self) -> bool:
        """Whether another tool wrote it."""
        return "format" in self.config

    @property
    def format(self) -> str:
        """The tool whose format its files are in."""
        return self.config.get("format", "saelab")

    @property
    def notes(self) -> list[str]:
        """Unusual facts about another tool's files, one sentence each; a converted SAE keeps them."""
        return list(self.config.get("notes") or (self.recorded.get("converted") or {}).get("notes", ()))

    @property
    def known_from(self) -> dict[str, str]:
        """How each entry of ``recorded`` is known: from the files, or from the table of public collections."""
        found = self.config.get("known_from") or (self.recorded.get("converted") or {}).get("known_from") or {}
        return dict(found)

    @property
    def recorded(self) -> dict[str, Any]:
        """The provenance that its own files record."""
        return self.config.get("metadata") or {}

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Provenance. If another tool recorded no model or hook point, those of the index's cache are used."""
        known = dict(self.recorded)
        if not known.get("hook_name") and known.get("hf_hook_name"):
            known["hook_name"] = known["hf_hook_name"]
        if self.is_foreign and self.index is not None:
            meta = self.index.meta
            names = {"model_name": "model", "hook_name": "hook_name", "cache_fingerprint": "cache_fingerprint"}
            known = {**{name: meta[key] for name, key in names.items() if meta.get(key)}, **known}
        return known | {name: value for name, value in self._given.items() if value}

    @property
    def hook_name(self) -> str:
        """The hook point of the SAE. Raises UserError if nothing records it."""
        if name := self.metadata.get("hook_name"):
            return name
        raise UserError(f"{self._called} does not record its hook point; give hook_name (--hook)")

    @property
    def hook_name_out(self) -> str:
        """The hook point that it writes to: that of a transcoder's target, else the one that it reads."""
        if not (name := self.metadata.get("hook_name_out") or self.metadata.get("hf_hook_name_out")):
            if self.sae.transcodes:
                raise UserError(f"{self._called} is a transcoder and does not record its target; give hook_name_out")
            return self.hook_name
        return name

    @property
    def model_name(self) -> str | None:
        """The language model it was trained on; of another tool's name for it (``gpt2-small``) the hub's."""
        name = self.metadata.get("model_name")
        return model_on_hub(name) if name and (self.is_foreign or "converted" in self.recorded) else name

    @property
    def rms_norm(self) -> float | None:
        """Root-mean-square norm of the activations that it reconstructs."""
        return self.metadata.get("rms_norm")

    @property
    def variant(self) -> str:
        """Registry name, or another tool's name of the architecture."""
        return (self.recorded.get("saelab") or {}).get("variant") or self.config.get("architecture") or "unknown"

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as far as the configuration records them."""
        return (self.recorded.get("saelab") or {}).get("config") or self.config

    @property
    def d_sae(self) -> int | None:
        """Latents that stand for features; None before the configuration is written."""
        # The file of an SAE of normalised activations counts what it carries of each token.
        carried = sum(KINDS.get(self.settings.get("normalize", ""), ()))
        found = self.config.get("d_sae")
        return found - carried if isinstance(found, int) else found

    @property
    def has_weights(self) -> bool:
        """Whether the first save is complete and readable."""
        if self.path is None or self.is_foreign:
            return True
        return (self.path / WEIGHTS).is_file() and "d_sae" in self.config

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """``evaluation.json``, or nothing before ``saelab evaluate``."""
        return {} if self.path is None else _read_json(self.path / EVALUATION)

    @cached_property
    def last_step(self) -> dict[str, Any]:
        """The last complete line of ``metrics.jsonl``."""
        rows = [] if self.path is None else read_metrics(self.path / METRICS, tail=4096)
        return rows[-1] if rows else {}

    @property
    def has_index(self) -> bool:
        """Whether the feature index is complete: its two tables exist."""
        return self.path is not None and all((self.path / INDEX / name).is_file() for name in (FEATURES, EXAMPLES))

    @cached_property
    def index(self) -> FeatureIndex | None:
        """The feature index; None where there is none."""
        if self.path is None or not self.has_index:
            return None
        from saelab.features import FeatureIndex

        return FeatureIndex(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the SAE's tensors."""
        return tensors_hash(self.sae.state_dict())

    @property
    def stamp(self) -> tuple[float, ...]:
        """Modification times of its files, which change when the run does."""
        if self.path is None:
            return ()
        names = (METRICS, EVALUATION, f"{INDEX}/{FEATURES}", EXPLANATIONS, LABELS)
        return (*self._stamp_of_weights, *(_mtime(self.path / name) for name in names))

    def check_latent(self, latent: int) -> int:
        """``latent`` if the dictionary has it, and it is no bookkeeping. Raises UserError otherwise."""
        last = self.sae.n_features - 1
        if not 0 <= latent <= last:
            raise UserError(f"latent {latent} does not exist: the SAE has latents 0 to {last}")
        return latent

    def max_activation(self, latent: int, pole: int = 1) -> float | None:
        """The largest magnitude of the latent on this pole in the index; None if it is unknown.

        It is unknown without an index, and on a pole on which the latent never fired.
        """
        self.check_latent(latent)
        if self.index is None or pole not in self.index.poles:
            return None
        return float(self.index.max_activation(latent, pole)) or None

    def provenance(self) -> dict[str, Any]:
        """What a vector or a recipe records of the SAE it came from."""
        return {"run": None if self.path is None else str(self.path), "sae_sha256": self.fingerprint}

    @property
    def _path(self) -> Path:
        assert self.path is not None, "an SAE in memory has no files"
        return self.path

    @property
    def _called(self) -> str:
        return str(self.path) if self.path is not None else "an SAE in memory"

    @cached_property
    def _own(self) -> dict[str, Any]:
        return _read_json(self._path / CONFIG)

    @property
    def _stamp_of_weights(self) -> tuple[float, ...]:
        path = self._path
        if not path.is_dir():
            return (_mtime(path),)
        names = sorted(entry.name for entry in path.iterdir())
        return tuple(_mtime(path / name) for name in names if any(form.may_hold(name) for form in FORMATS.values()))


class Place(NamedTuple):
    """One folder met on a walk: its files, without links that lead out of the walked folder, and the SAEs in it."""

    folder: Path
    files: set[str]
    runs: list[Run]


def walk(root: Path) -> Iterator[Place]:
    """Every folder below ``root`` that may hold runs, caches or recipes.

    Links to folders are not followed; links to files count if the file is below ``root``, as in the hub's cache.

    Raises UserError where ``root`` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name the folder that holds your runs")
    # What an SAE's files can be called, or the subfolders they are in: most folders hold nothing of the kind.
    parts = {pattern.partition("/")[0] for form in FORMATS.values() for pattern in form.files}
    is_part = re.compile("|".join(map(fnmatch.translate, sorted(parts)))).match
    inside = root.resolve()
    for name, folders, names in os.walk(root, followlinks=False):
        folder = Path(name)
        links = {entry for entry in (*folders, *names) if _leads_out(folder / entry, inside)}
        files = {*names} - links
        runs = _runs_in(folder, files, {entry for entry in (*folders, *names) if is_part(entry)}, links, root)
        # The checkpoints of a run are not runs; a folder of that name elsewhere is an ordinary folder.
        is_run = RUN in files or any(run.path == folder for run in runs)
        inner = {INDEX, CHECKPOINTS, CONTROLS} if is_run else {INDEX}
        folders[:] = sorted(entry for entry in folders if not entry.startswith(".") and entry not in inner)
        yield Place(folder, files, runs)


def _leads_out(path: Path, root: Path) -> bool:
    """Whether a path is a link to a folder, or to a file that is not below ``root``."""
    return path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root))


def _runs_in(folder: Path, files: set[str], parts: set[str], links: set[str], root: Path) -> list[Run]:
    if RECIPE in files or (folder.parent / RECIPE).is_file():
        return []  # the SAEs inside a recipe belong to it
    # Reading an SAE must not lead out of the folder: an SAE of which a part is a link is not read.
    if METRICS in files or (parts and not parts & links and _holds_sae(folder)):
        return [Run(path=folder, name=folder.relative_to(root).as_posix())]
    found = [folder / name for name in sorted(files & parts)]
    return [Run(path=path, name=path.relative_to(root).as_posix()) for path in found if _holds_sae(path)]


def _holds_sae(path: Path) -> bool:
    """Whether a file or folder is an SAE. A torch file that cannot be read does not count as one."""
    try:
        return find_format(path) is not None
    except (UserError, OSError):
        return False


def _description(found: Foreign) -> dict[str, Any]:
    return {
        "architecture": found.architecture,
        "format": found.format,
        "d_in": found.d_in,
        "d_sae": found.d_sae,
        "k": found.k,
        **({"d_out": found.W_dec.shape[1]} if found.transcodes else {}),
        "notes": list(found.notes),
        "known_from": dict(found.known_from),
        "metadata": {name: value for name, value in found.metadata.items() if value is not None},
    }


@functools.lru_cache(maxsize=256)
def _read_description(path: Path, stamp: tuple[float, ...], options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    # The weights are not kept: listing a folder of large SAEs must not fill the memory.
    return _description(read(path, **dict(options)))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with damaged(path, "write the run again"):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get("metadata", {}), dict):
            raise TypeError("it holds no JSON object")
        return content


def _mtime(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
