"""Which format a path is in, and its SAE: the one function users call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saelab.errors import MALFORMED, UserError, first_line
from saelab.interop.foreign import Foreign
from saelab.interop.formats import collections, dictionary_learning, linear, overcomplete, saelens
from saelab.sae import SAE
from saelab.sae.weights import load_config, load_metadata, load_sae


class Format(NamedTuple):
    """A format: how to recognise it, how to read it, and what may be said about a file that does not say it itself."""

    name: str
    sniff: Callable[[Path], bool]
    read: Callable[..., Foreign]
    options: tuple[str, ...] = ()


# Order matters: a format named by a file of its own comes before those recognised by looking inside.
FORMATS = [
    Format("saelens", saelens.sniff, saelens.read),
    Format("sparsify", linear.sniff_sparsify, linear.read_sparsify),
    Format("llama_scope", collections.sniff_llama_scope, collections.read_llama_scope),
    Format("llamascopium", collections.sniff_llamascopium, collections.read_llamascopium),
    Format("gemma_scope", collections.sniff_gemma_scope, collections.read_gemma_scope),
    Format("qwen_scope", collections.sniff_qwen_scope, collections.read_qwen_scope),
    Format("dictionary_learning", dictionary_learning.sniff, dictionary_learning.read),
    Format("openai", linear.sniff_openai, linear.read_openai),
    Format("goodfire", collections.sniff_goodfire, collections.read_goodfire),
    Format("overcomplete", overcomplete.sniff, overcomplete.read, ("k", "pursuit", "threshold")),
]


def is_ours(path: Path) -> bool:
    """A run folder written by saelab."""
    config = load_config(path) if saelens.sniff(path) else None
    metadata = config.get("metadata") if isinstance(config, dict) else None
    return isinstance(metadata, dict) and "saelab" in metadata


def detect(path: Path) -> Format:
    """The format of a file or folder of another tool."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file, a folder, or a hub id such as org/repo")
    for form in FORMATS:
        if form.sniff(path):
            return form
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else path.name
    raise UserError(
        f"{path} is in no SAE format known here (found {inside}); known: {', '.join(f.name for f in FORMATS)}"
    )


def read(path: Path | str, **options: Any) -> Foreign:
    """The SAE at ``path`` in canonical form; ``options`` say what a bare file does not (overcomplete: k, pursuit)."""
    path = Path(path)
    form = detect(path)
    if unknown := sorted(options.keys() - set(form.options)):
        raise UserError(f"{path} is a {form.name} SAE, which says itself what {', '.join(unknown)} would; leave it out")
    try:
        return form.read(path, **options)
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{path} is no sound {form.name} SAE ({type(error).__name__}: {first_line(error)})") from error


def load(path: Path | str, device: str | torch.device = "cpu", **options: Any) -> SAE:
    """Any tool's SAE as one of ours, in eval mode on raw activations: a file, a folder, or a hub id ``org/repo``.

    Nothing in the file is executed. A hub id is ``org/repo`` or ``org/repo/path/in/it``; a path that exists on disk
    is never taken for one.
    """
    return load_with_metadata(path, device, **options).sae


class Loaded(NamedTuple):
    """An SAE with what its files say of it."""

    sae: SAE
    metadata: dict[str, Any]  # where known: hook_name, hf_hook_name, model_name, and for runs of ours rms_norm
    path: Path  # on this machine
    notes: Sequence[str] = ()  # what is odd about it, one sentence each


def load_with_metadata(path: Path | str, device: str | torch.device = "cpu", **options: Any) -> Loaded:
    """What :func:`load` gives, with the provenance beside it."""
    local = resolve(path)
    if is_ours(local) and not options:
        return Loaded(load_sae(local, device), load_metadata(local), local)
    foreign = read(local, **options)
    return Loaded(foreign.to_sae().to(device), foreign.metadata, local, foreign.notes)


def resolve(path: Path | str) -> Path:
    """The file or folder itself, or where it lies after fetching a hub id."""
    local = Path(path)
    if local.exists() or not _looks_like_hub(str(path)):
        return local
    from saelab.interop.fetch import download

    return download(str(path))


def _looks_like_hub(path: str) -> bool:
    return path.count("/") >= 1 and not path.startswith(("/", ".", "~")) and "\\" not in path
