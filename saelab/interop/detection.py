"""Detect the format of a path, and load the SAE in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saelab.errors import MALFORMED, UserError, first_line
from saelab.interop import kind
from saelab.interop.collections import complete, on_hub
from saelab.interop.fetch import download, resolve, split_id
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format
from saelab.interop.formats import FORMATS
from saelab.layout import CONFIG, WEIGHTS
from saelab.sae import SAE
from saelab.sae.weights import load_config, load_sae


def is_ours(path: Path) -> bool:
    """Whether ``path`` is a run folder written by saelab. Raises UserError for a damaged configuration."""
    if not ((path / CONFIG).is_file() and (path / WEIGHTS).is_file()):
        return False
    config = load_config(path)
    metadata = config.get("metadata") if isinstance(config, dict) else None
    return isinstance(metadata, dict) and "saelab" in metadata


def find_format(path: Path) -> Format | None:
    """The format of a file or folder of another tool, or None. Raises UserError for a torch file it cannot read."""
    # A format known by the name of a file comes before those that are recognised by looking inside one.
    ordered = sorted(FORMATS.values(), key=lambda form: (form.by_content, form.name))
    return next((form for form in ordered if form.sniff(path)), None)


def detect(path: Path) -> Format:
    """The format of a file or folder of another tool. Raises UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file, a folder, or a hub id such as hf://org/repo")
    form = find_format(path)
    if form is not None:
        return form
    kind.check_unknown(path)
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else path.name
    raise UserError(f"{path} is in no SAE format known here (found {inside}); known: {', '.join(sorted(FORMATS))}")


def read(path: Path | str, is_sae: bool = False, **options: Any) -> Foreign:
    """The SAE at ``path`` in canonical form; ``options`` give what a bare file lacks (overcomplete: k, pursuit).

    With ``is_sae`` it is taken for an SAE although nothing about it says so and its directions speak against it.
    """
    path = Path(path)
    form = detect(path)
    if unknown := sorted(options.keys() - set(form.options)):
        raise UserError(f"{path} is a {form.name} SAE, which does not take {', '.join(unknown)}; leave it out")
    try:
        foreign = form.read(path, **options)
        complete(foreign, path)
        reason = None
        if foreign.W_enc is not None and not foreign.transcodes:
            reason = kind.doubt(foreign.W_enc, foreign.W_dec)
        if reason is not None:
            placed = any(foreign.metadata.get(name) for name in ("hook_name", "hf_hook_name"))
            if not (is_sae or placed or form.tells_kind):
                raise UserError(
                    f"{path} may be a transcoder: neither its files nor its name say what it reads, and {reason}; "
                    "put it into a folder named as its repository, or vouch for it with --is-sae (is_sae=True)"
                )
            foreign.notes.append(reason)
        return foreign
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(
            f"{path} is not a readable {form.name} SAE ({type(error).__name__}: {first_line(error)})"
        ) from error


def load(path: Path | str, inside: str = "", *, device: str | torch.device = "cpu", **options: Any) -> SAE:
    """Load an SAE of any tool, from a file, a folder or a hub id, in eval mode and in units of raw activations.

    No code in a file is ever run. A hub id is ``hf://org/repo`` or ``hf://org/repo/path/in/it``; without the prefix it
    is looked up on the hub only where there is no folder ``org`` here. ``inside`` is the path in the repository or in
    the folder, which may be called by its name alone if it is one of a known collection:
    ``load("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")``. Raises UserError for anything but an SAE.
    """
    local = resolve(f"{path}/{inside}" if inside else path)
    sae = load_sae(local) if is_ours(local) and not options else read(local, **options).to_sae()
    return sae.to(device)


def from_pretrained(repo: str, path: str = "", revision: str | None = None) -> SAE:
    """The SAE in folder ``path`` (in SAELens' layout the hook's name) of the hub repository ``org/repo``.

    ``repo`` may also be the name of a known collection, and ``path`` the id that SAELens gives the SAE in it.
    """
    hub_id = f"{repo}/{path}" if path else repo
    hub_id = on_hub(hub_id) or hub_id
    split_id(hub_id)
    return load(download(hub_id, revision))
