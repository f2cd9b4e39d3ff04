"""``Format``, one file format of SAEs, and the registry that the modules in ``formats/`` fill.

To add a format, add one file to ``formats/`` that ends with ``register(Format(...))``: loading, listing a folder,
fetching from the hub and ``saelab convert`` use the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from saelab.errors import UserError
from saelab.interop.foreign import Foreign
from saelab.sae.inference import InferenceForm

Writer = Callable[[InferenceForm, Path, dict[str, Any]], None]
FORMATS: dict[str, Format] = {}


class Format(NamedTuple):
    """How one tool stores an SAE.

    Attributes:
        name: The tool or the collection, as a Python name.
        files: Patterns (``*.pt``) of the files that an SAE consists of, relative to its folder. They decide what is
            fetched from a hub and which files are looked at when a folder is searched, so they should be narrow.
        sniff: Whether a file or folder is in this format; called for any path, raises nothing for a readable one.
        read: The SAE in canonical form; raises UserError for what cannot be read. Takes ``options`` by keyword.
        write: Writes an inference form and its metadata into an empty folder; None where saelab only reads.
        options: Facts that the user may have to give because the files do not record them.
        holds_targets: Whether ``write`` also writes transcoders.
        tells_kind: Whether every file says of itself that it is an SAE, and no transcoder.
        by_content: Whether ``sniff`` looks inside files. Such formats are tried after those known by a file's name.
    """

    name: str
    files: tuple[str, ...]
    sniff: Callable[[Path], bool]
    read: Callable[..., Foreign]
    write: Writer | None = None
    options: tuple[str, ...] = ()
    by_content: bool = False
    tells_kind: bool = False
    holds_targets: bool = False

    def may_hold(self, file_name: str) -> bool:
        """Whether a file of this name can be part of an SAE in this format."""
        return any(fnmatch(file_name, pattern.rpartition("/")[2]) for pattern in self.files)


def register(form: Format) -> Format:
    """Make a format known. Raises UserError for a name that another module has taken."""
    known = FORMATS.get(form.name)
    if known is not None and known.read.__module__ != form.read.__module__:
        raise UserError(f"the format name {form.name!r} is taken by {known.read.__module__}; choose another name")
    FORMATS[form.name] = form
    return form


def subtracting_bias(form: InferenceForm) -> Tensor:
    """The encoder's bias ``[d_sae]`` for a tool that always subtracts ``b_dec`` from its input."""
    t = form.tensors
    return t["b_enc"] if form.config["apply_b_dec_to_input"] else t["b_enc"] + t["b_dec"] @ t["W_enc"]
