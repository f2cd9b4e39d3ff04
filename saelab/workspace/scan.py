"""Find the runs, caches, sweeps and evaluations of steering below a folder.

Nothing outside the folder is opened: names are resolved first, links included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from saelab.data.cache import ActivationCache
from saelab.errors import UserError, near_matches
from saelab.layout import INDEX, MANIFEST, RECIPE, STEER_EVAL, SWEEP_TABLE
from saelab.runs import Run
from saelab.runs.run import walk


@dataclass(frozen=True)
class Workspace:
    """The folder given to ``saelab app`` and what is below it, at the time of the scan."""

    root: Path
    runs: dict[str, Run] = field(default_factory=dict)
    caches: dict[str, Path] = field(default_factory=dict)
    sweeps: dict[str, Path] = field(default_factory=dict)
    """Folders that hold the table of a finished sweep."""
    steer_evals: dict[str, Path] = field(default_factory=dict)
    """Folders that hold an evaluation of steering."""

    @classmethod
    def scan(cls, root: Path | str) -> Workspace:
        """Look for SAEs of any tool, runs in training, caches and sweeps, at any depth.

        A run, cache or sweep of which a file is a link to one outside the folder is left out.
        """
        root = Path(root).resolve()
        runs, caches, sweeps, steer_evals = {}, {}, {}, {}
        for place in walk(root):
            name = place.folder.relative_to(root).as_posix()
            if _leads_out(place.folder, root):
                continue
            runs |= {run.name: run for run in place.runs}
            if RECIPE in place.files:
                continue
            if SWEEP_TABLE in place.files:
                sweeps[name] = place.folder
            if STEER_EVAL in place.files:
                steer_evals[name] = place.folder
            if MANIFEST in place.files and not place.runs:
                caches[name] = place.folder
        return cls(root, *(dict(sorted(found.items())) for found in (runs, caches, sweeps, steer_evals)))

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
        """The cache a run was trained on, with its target, if they (or some of their fingerprints) lie below."""
        cache, of_target = (self._cache(run.metadata.get(f"{name}_fingerprint")) for name in ("cache", "target"))
        if cache is None or run.metadata.get("target_fingerprint") is None:
            return cache
        return None if of_target is None else cache.with_target(of_target)

    def _cache(self, wanted: str | None) -> ActivationCache | None:
        for folder in self.caches.values():
            try:
                cache = ActivationCache(folder)
            except (UserError, OSError):
                continue  # a cache that is still being written does not count
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


def _leads_out(folder: Path, root: Path) -> bool:
    """Whether a file in a folder, or in the index below it, is in truth outside ``root``."""
    files = [path for place in (folder, folder / INDEX) if place.is_dir() for path in place.iterdir()]
    return any(path.is_symlink() and not path.resolve().is_relative_to(root) for path in files)
