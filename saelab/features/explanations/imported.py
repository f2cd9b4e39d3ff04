"""Labels of latents that others have published: read from Neuronpedia's export, kept beside the run's own.

Neuronpedia exports one JSON object per explanation, in files of JSON lines (``batch-0.jsonl.gz``) or in one JSON list:
``modelId``, ``layer`` (``20-gemmascope-res-16k``: block, release, place, width), ``index`` (a number or its text),
``description``, ``explanationModelName``, ``typeName`` (the method).
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from saelab.errors import UserError, damaged, first_line
from saelab.files import replace
from saelab.layout import LABELS
from saelab.vocabulary import storable

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
# Word of a source's name -> what a hook point of that place contains.
PLACES = {"res": ("resid",), "mlp": ("mlp",), "att": ("attn", "hook_z")}
OTHERS = re.compile(r"transcoder|crosscoder|clt", re.I)


class ImportedLabel(NamedTuple):
    """What someone else's label says: ``source`` is ``model/layer`` of Neuronpedia, ``method`` how it was made."""

    text: str
    source: str
    explainer: str
    method: str


@dataclass
class LabelFile:
    """The labels in some files, by latent, and what was left out."""

    labels: dict[int, ImportedLabel] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)
    repeated: int = 0  # further labels of a latent that has one: the first is kept
    empty: int = 0


def read_labels(paths: Sequence[Path], d_sae: int, hook_name: str | None = None) -> LabelFile:
    """The labels in files, or in all such files of a folder, for an SAE of ``d_sae`` latents at ``hook_name``.

    Raises UserError for labels of another layer or place in the block, of a latent that the SAE does not have, and for
    what is not such a file.
    """
    found = LabelFile()
    for path in paths:
        for file in _files(path):
            for number, row in _rows(file):
                _add(found, row, d_sae, f"{file}, line {number}")
    if not found.labels:
        raise UserError(f"{', '.join(map(str, paths))} holds no label; give Neuronpedia's export of explanations")
    if len(found.layers) > 1:
        several = ", ".join(sorted(found.layers)[:3])
        raise UserError(f"the files hold labels of several SAEs ({several}); give those of one")
    for layer in found.layers:
        _check_layer(layer, hook_name)
    return found


def save_labels(run_folder: Path, found: LabelFile) -> None:
    """Replace the imported labels of a run."""
    latents = sorted(found.labels)
    columns = {name: [getattr(found.labels[j], name) for j in latents] for name in ImportedLabel._fields}
    table = pa.table({"latent": pa.array(latents, pa.int32()), **columns})
    replace(Path(run_folder) / LABELS, lambda partial: pq.write_table(table, partial))


def imported_labels(run_folder: Path | str) -> dict[int, ImportedLabel]:
    """The imported labels of a run by latent, empty where there are none. Shared by all callers: never change it."""
    path = Path(run_folder) / LABELS
    if not path.is_file():
        return {}
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: Path, modified: int, size: int) -> dict[int, ImportedLabel]:
    with damaged(path, "import the labels again", pa.ArrowException, OSError):
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
        columns = [table[name].to_pylist() for name in ("latent", *ImportedLabel._fields)]
        return {latent: ImportedLabel(*row) for latent, *row in zip(*columns, strict=True)}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a file or a folder of Neuronpedia's export")
    found = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
    if not found:
        raise UserError(f"{path} holds no file that ends in {', '.join(ENDINGS)}; give the folder of explanations")
    return found


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each label in a file."""
    opened, number = gzip.open if file.suffix == ".gz" else open, 0
    try:
        with opened(file, "rt", encoding="utf-8-sig") as lines:
            if file.name.removesuffix(".gz").endswith(".json"):
                content = json.load(lines)
                entries = enumerate(content if isinstance(content, list) else [content], 1)
            else:
                entries = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
            for number, entry in entries:
                row = json.loads(entry) if isinstance(entry, str) else entry
                if not isinstance(row, dict):
                    raise UserError(f"{file}, line {number}: holds a {type(row).__name__}, not an object; get it again")
                yield number, row
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as error:
        where = f"{file}, line {number}," if number else f"{file}"
        raise UserError(f"{where} is not a file of JSON lines ({first_line(error)}); get it again") from error


def _add(found: LabelFile, row: dict[str, Any], d_sae: int, where: str) -> None:
    try:
        latent = _latent(row["index"])
        text = storable(" ".join(str(row["description"] or "").split()))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where} has no index and description, which every label of Neuronpedia has ({first_line(error)})"
        ) from error
    model, layer = (storable(str(row.get(name) or "")) for name in ("modelId", "layer"))
    if not 0 <= latent < d_sae:
        raise UserError(f"{where} is of latent {latent}, the SAE has latents 0 to {d_sae - 1}; give this SAE's labels")
    found.models |= {model} - {""}
    found.layers |= {layer} - {""}
    if not text:
        found.empty += 1
    elif latent in found.labels:
        found.repeated += 1
    else:
        source = "/".join(name for name in (model, layer) if name)
        explainer, method = (storable(str(row.get(n) or "")) for n in ("explanationModelName", "typeName"))
        found.labels[latent] = ImportedLabel(text, source, explainer, method)


def _latent(value: Any) -> int:
    """The number of a latent, which may be written as text; ValueError for anything that is no whole number."""
    if isinstance(value, str):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise ValueError(f"index {value!r} is no whole number")
    return int(value)


def _check_layer(layer: str, hook_name: str | None) -> None:
    """UserError where ``20-gemmascope-res-16k`` cannot be the SAE at ``hook_name``."""
    if word := OTHERS.search(layer):
        raise UserError(f"the labels are of {layer}, a {word[0].lower()}, not of an SAE; give those of this SAE")
    number = re.match(r"\d+", layer)
    block = re.search(r"\.(\d+)(\.|$)", hook_name or "")
    if number and block and number[0] != block[1]:
        raise UserError(f"the labels are of {layer}, the SAE reads {hook_name}; give those of block {block[1]}")
    words = set(re.split(r"[-_]", layer.lower()))
    for word, parts in PLACES.items():
        known = any(part in (hook_name or "") for parts in PLACES.values() for part in parts)
        if word in words and known and not any(part in (hook_name or "") for part in parts):
            raise UserError(f"the labels are of {layer}, the SAE reads {hook_name}; give those of this place")
