"""Opening the SAE that a command works on, its activation cache, and the folder that results go into."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saelab.cli.console import console
from saelab.cli.placement import follows, scratch_folder
from saelab.data.cache import ActivationCache
from saelab.data.cache.storage import Folder
from saelab.errors import UserError
from saelab.files import new_folder, url_of
from saelab.interop import resave
from saelab.interop.fetch import wanted_files
from saelab.interop.origin import Origin
from saelab.layout import MANIFEST
from saelab.lm.hook_names import short
from saelab.runs import Run


def open_run(name: Path | str, hook_name: str = "", **options: Any) -> Run:
    """Open and read the SAE at a path or hub id; notes about its files are printed on stderr."""
    run = Run.open(name, hook_name, **options)
    _ = run.sae
    print_notes(run.notes)
    return run


def print_notes(notes: Iterable[str]) -> None:
    """Print remarks on an SAE's files on stderr, one line each."""
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def open_pair(cache: Path, target: Path | None, buffer_gb: float = 8.0) -> ActivationCache:
    """The cache, with its target if one is named; both may lie behind URLs."""
    if not buffer_gb >= 0:
        raise UserError(f"buffer_gb={buffer_gb} must not be negative")
    size = int(buffer_gb * 1e9) // (1 if target is None else 2)
    found = ActivationCache(cache, buffer_bytes=size)
    return found if target is None else found.with_target(ActivationCache(target, buffer_bytes=size))


def open_with_cache(
    name: Path | str, cache_folder: Path, out: Path | None, target: Path | None = None
) -> tuple[Run, ActivationCache, Path]:
    """The SAE, the cache, and the folder that results are written into (see :func:`results_folder`).

    A transcoder's cache comes with its target: ``target``, or the one that lies beside it (see :func:`find_target`).
    UserError where the cache holds another model or hook point than the SAE was trained on; another text is fine.
    """
    run, cache = open_run(name), ActivationCache(cache_folder)
    if run.sae.transcodes and target is None:
        target = find_target(run, cache)
    cache = open_pair(cache_folder, target)
    # Other tools use other names for a model, "gpt2-small" for "gpt2".
    names = ["hook_name"] if run.is_foreign else ["model_name", "hook_name"]
    have = {"model_name": cache.manifest.model, "hook_name": cache.hook_name}
    for key in names:
        want = run.recorded.get(key)
        if want and have[key] and short(want) != short(have[key]):
            raise UserError(
                f"{run.path} was trained on {key}={want}, {cache.path} holds {have[key]}; "
                "use a cache of the same model and hook point"
            )
    if cache.target is not None and short(run.hook_name_out) != short(cache.target.hook_name or run.hook_name_out):
        raise UserError(
            f"{run.path} writes at {run.hook_name_out}, the target {cache.target.path} holds {cache.target.hook_name}; "
            "use a cache of that hook point"
        )
    print_notes(differences(run, cache))
    return run, cache, results_folder(run, out)


def find_target(run: Run, cache: ActivationCache) -> Path:
    """The cache of a transcoder's target: of the folders beside ``cache`` the one with its hook point.

    For the cache that it was trained on, else the target that it was trained on.
    """
    here = cache.folder.local
    beside = Folder(here.parent if here is not None else cache.path.rpartition("/")[0])
    for folder in map(beside.sub, beside.names()):
        if Path(folder.url) != Path(cache.path) and folder.exists(MANIFEST):
            other = ActivationCache(folder.url)
            if other.hook_name and short(other.hook_name) == short(run.hook_name_out) and other.n_rows == cache.n_rows:
                return Path(folder.url)
    known = run.recorded.get("target_cache")
    same = run.recorded.get("cache_fingerprint") == cache.fingerprint
    if known and same and (url_of(known) or Path(known).is_dir()):
        return Path(known)
    raise UserError(
        f"{run.path} is a transcoder, and no cache of its target {run.hook_name_out} lies beside {cache.path}; name it "
        "with --target"
    )


def differences(run: Run, cache: ActivationCache) -> list[str]:
    """How the model and the text of the cache differ from what the SAE was trained on, one sentence each."""
    found: list[str] = []
    recorded, manifest = run.recorded, cache.manifest
    if run.is_foreign and not same_model(manifest.model, run):
        found.append(f"the SAE was trained on {run.model_name}, the cache holds activations of {manifest.model}")
    if recorded.get("prepend_bos") and manifest.bos == "none":
        found.append("the SAE was trained on contexts that begin with BOS, those of the cache do not")
    size = recorded.get("context_size")
    if isinstance(size, int) and manifest.context_length > size:
        found.append(f"the SAE was trained on contexts of {size} tokens, the cache has {manifest.context_length}")
    return found


def same_model(name: str, run: Run) -> bool:
    """Whether ``name`` can be the model of ``run``: tools call a model differently. True where either is unknown."""
    ours, theirs = _plain(run.model_name or ""), _plain(name)
    return ours in theirs or theirs in ours


def _plain(model: str) -> str:
    """A model's name as different tools would agree on it: ``gpt2-small`` is ``openai-community/gpt2``."""
    name = model.rpartition("/")[2].lower().replace("instruct", "it")
    return re.sub("[^a-z0-9]", "", name.replace("gpt2-small", "gpt2"))


def results_folder(run: Run, out: Path | None = None) -> Path:
    """The folder for results about ``run``: its own folder, or a copy of the SAE.

    The copy is made in ``out``. An SAE from the hub, whose folder is the hub's cache, is copied by default into the
    working folder, under the name of its repository. A single file cannot hold results: it is converted into a run
    folder. Where the copy is gets printed; every command can open it.
    """
    path = run.path
    assert path is not None
    if follows():
        return scratch_folder()
    on_hub = run.origin.startswith("hf://")
    if out is None and not on_hub:
        if path.is_dir():
            return path
        raise UserError(f"{path} is a file, and results need a folder: name a new one with --out, to convert it into")
    folder = out or Path(*run.origin.removeprefix("hf://").split("/")[1:])
    if not path.is_dir():
        return _converted(run, folder if out else folder.with_suffix(""))
    files = {file.relative_to(path): file for pattern in wanted_files() for file in path.glob(pattern)}
    if folder.exists():
        if any(not (folder / f).is_file() or (folder / f).stat().st_size != s.stat().st_size for f, s in files.items()):
            raise UserError(f"{folder} exists and does not hold the SAE of {run.origin}; name a new folder with --out")
        return folder
    with new_folder(folder) as temporary:
        for name, file in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, temporary / name)
        if run.is_foreign:
            Origin.of(path).write(temporary)
    console.print(f"copied {run.origin} to {folder}; results go there", markup=False, soft_wrap=True)
    return folder


def _converted(run: Run, folder: Path) -> Path:
    if folder.exists():
        source = Run.open(folder).recorded.get("converted") or {}
        if source.get("source") != run.origin:
            raise UserError(f"{folder} exists and is not the SAE of {run.origin}; name a new folder with --out")
        return folder
    assert run.path is not None
    resave(run.sae, run.path, folder, provenance(run))
    console.print(f"converted {run.origin} to {folder}; results go there", markup=False, soft_wrap=True)
    return folder


def provenance(run: Run) -> dict[str, Any]:
    """What a converted SAE records: what its files did, and of another tool's where it is from and the notes on it."""
    if not run.is_foreign:
        return run.recorded
    source = {"format": run.format, "source": run.origin, "notes": run.notes, "known_from": run.known_from}
    return {**run.recorded, "converted": source}
