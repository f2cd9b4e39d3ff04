"""Make activation caches from files of other tools: ``.npy`` files, dataset columns, SAELens' Arrow caches.

Sources are read block by block, so they may be larger than memory. For activations that are tensors already, from
nnsight or hooks of your own, use :meth:`ActivationCache.from_tensors`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from saelab.data.cache.manifest import Manifest, check_provenance
from saelab.data.cache.reader import ActivationCache
from saelab.data.cache.storage import Folder
from saelab.data.cache.writer import CacheWriter
from saelab.data.text.rows import is_saved_dataset, load_saved_dataset
from saelab.errors import UserError, first_line, near_matches

TOKEN_COLUMNS = ("token_ids", "tokens", "input_ids")
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow", ".csv": "csv"}


class Source(NamedTuple):
    """Stored activations: ``blocks(n)`` yields about ``n`` rows a time, ``[contexts, length, d_in]``, and token ids."""

    name: str
    n_rows: int
    length: int  # rows in a context
    d_in: int
    blocks: Callable[[int], Iterator[tuple[Tensor, Tensor | None]]]
    dtype: str = "float32"  # on disk, if nobody asks for another
    hook_name: str = ""


def import_activations(
    path: str | os.PathLike[str],
    source: Path | str,
    *,
    column: str | None = None,
    tokens: str | None = None,
    split: str = "train",
    context_length: int | None = None,
    skip_first: int = 0,
    dtype: str = "auto",
    held_out: float = 0.05,
    shard_rows: int = 1 << 16,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **provenance: Any,
) -> ActivationCache:
    """Write the cache ``path`` from stored activations.

    ``source`` is a ``.npy`` file (``[n, d_in]`` or ``[contexts, length, d_in]``), a dataset saved with ``save_to_disk``
    (as SAELens' activation caches are), or a ``.parquet``, ``.jsonl`` or ``.arrow`` file. ``column`` names the
    dataset's column of activations; it may be left out where only one column holds vectors; ``tokens`` is the ``.npy``
    file or the column of token ids. Rows of a dataset are contexts ``[length, d_in]``, or single vectors which
    ``context_length`` joins to contexts. ``skip_first`` leaves out that many positions of each context, whose text is
    kept. ``dtype`` is the precision on disk; ``auto`` keeps float16 and stores everything else as float32.
    ``provenance`` are manifest fields such as ``model``, ``hook_name`` and ``bos``.
    """
    check_provenance(provenance)
    found = _open(Path(source), column, tokens, split, context_length)
    if found.n_rows == 0:
        raise UserError(f"{source} holds no activations; give a file that holds some")
    if not 0 <= skip_first < found.length:
        raise UserError(f"skip_first={skip_first} leaves nothing of contexts of {found.length} positions; lower it")
    if found.hook_name:
        provenance.setdefault("hook_name", found.hook_name)
    provenance.setdefault("text", found.name)
    manifest = Manifest(
        d_in=found.d_in,
        dtype=found.dtype if dtype == "auto" else dtype,
        context_length=found.length,
        skip_first=skip_first,
        held_out_fraction=held_out,
        **provenance,
    )
    writer = CacheWriter(Folder(path), manifest, overwrite=overwrite)
    try:
        _write(writer, found, shard_rows, progress or (lambda done, total: None))
    except BaseException:
        writer.discard()  # half an import cannot be resumed
        raise
    return ActivationCache(path)


def _write(writer: CacheWriter, found: Source, shard_rows: int, progress: Callable[[int, int], None]) -> None:
    done, skip = 0, writer.manifest.skip_first
    for acts, ids in found.blocks(shard_rows):
        contexts, length, d_in = acts.shape
        text = torch.zeros(contexts * length, dtype=torch.int64) if ids is None else ids.reshape(-1).long()
        if len(text) != contexts * length:
            raise UserError(
                f"{found.name} has {len(text)} token ids for {contexts * length} activations from row {done} on; name "
                "tokens that are one for each"
            )
        slots = torch.arange(contexts * length).reshape(contexts, length)[:, skip:].reshape(-1)
        documents = torch.arange(contexts).repeat_interleave(length) + done // length
        writer.write_shard(acts.reshape(-1, d_in)[slots], text, slots, documents)
        done += contexts * length
        progress(done, found.n_rows)
    writer.finish()


def _open(path: Path, column: str | None, tokens: str | None, split: str, context_length: int | None) -> Source:
    if context_length is not None and context_length < 1:
        raise UserError(f"context_length={context_length} must be at least 1")
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .npy file, a saved dataset, or a parquet, jsonl or arrow file")
    if path.suffix == ".npy":
        return _npy(path, tokens, context_length)
    return _dataset(path, column, tokens, split, context_length)


def _npy(path: Path, tokens: str | None, context_length: int | None) -> Source:
    acts = _array(path)
    if acts.ndim not in {2, 3} or not np.issubdtype(acts.dtype, np.floating):
        raise UserError(
            f"{path} has shape {acts.shape} of {acts.dtype}; activations are floats [n, d_in] or [c, l, d_in]"
        )
    length = _context(acts.shape[1] if acts.ndim == 3 else None, context_length, path)
    rows, d_in = int(np.prod(acts.shape[:-1])), acts.shape[-1]
    flat = acts.reshape(rows, d_in)
    ids = None if tokens is None else _array(Path(tokens)).reshape(-1)
    if ids is not None and (len(ids) != rows or not np.issubdtype(ids.dtype, np.integer)):
        raise UserError(f"{tokens} holds {len(ids)} {ids.dtype} numbers; {rows} token ids are needed, one for each row")
    _whole(rows, length, path)

    def blocks(n: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        step = max(n // length, 1) * length
        for start in range(0, rows, step):
            part = rearrange(
                _tensor(flat[start : start + step]), "(context position) d_in -> context position d_in", position=length
            )
            yield part, None if ids is None else _tensor(ids[start : start + step])

    return Source(str(path), rows, length, d_in, blocks, "float16" if acts.dtype.itemsize == 2 else "float32")


def _tensor(part: np.ndarray) -> Tensor:
    """A copy of part of a file, whatever the byte order and the width of its numbers."""
    if np.issubdtype(part.dtype, np.integer):
        return torch.from_numpy(part.astype(np.int64))
    return torch.from_numpy(part.astype(np.float16 if part.dtype.itemsize == 2 else np.float32))


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; name a .npy file")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a readable .npy file ({first_line(error)}); save it again") from error


def _dataset(path: Path, column: str | None, tokens: str | None, split: str, context_length: int | None) -> Source:
    data = _load(path, split).with_format("numpy")
    if len(data) == 0:
        raise UserError(f"{path} holds no rows; give a dataset that has some")
    first = data[0]
    column = _column(path, first, column)
    shape = np.shape(first[column])
    if tokens is None:
        tokens = next((name for name in TOKEN_COLUMNS if name in first and name != column), None)
    elif tokens not in first:
        raise UserError(f"{path} has no column {tokens!r}; {near_matches(tokens, first)}")
    length = _context(shape[0] if len(shape) == 2 else None, context_length, path)
    each = length if len(shape) == 2 else 1
    rows, d_in = len(data) * each, shape[-1]
    _whole(rows, length, path)

    def blocks(n: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        step = max(n // length, 1) * length // each
        for start in range(0, len(data), step):
            part = data[start : start + step]
            try:
                acts = torch.from_numpy(np.stack(list(part[column])))
                ids = None if tokens is None else torch.from_numpy(np.stack(list(part[tokens])).astype(np.int64))
                yield acts.reshape(-1, length, d_in), None if ids is None else ids.reshape(-1, length)
            except (ValueError, RuntimeError, TypeError) as error:
                raise UserError(
                    f"{path}: rows from {start} on differ in shape from the first, {shape} in column {column!r}; "
                    "contexts must be equally long"
                ) from error

    stored = _stored_dtype(data.features[column])
    return Source(str(path), rows, length, d_in, blocks, stored, column if "hook_" in column else "")


def _stored_dtype(feature: Any) -> str:
    """float16 for a column of such numbers, whatever their shape; else float32."""
    while isinstance(feature, (list, tuple)) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, (list, tuple)) else feature.feature
    return "float16" if getattr(feature, "dtype", "") == "float16" else "float32"


def _load(path: Path, split: str) -> Any:
    import datasets

    if is_saved_dataset(path):
        return load_saved_dataset(path, split)
    if path.suffix not in LOADERS:
        raise UserError(
            f"{path} is neither a saved dataset (no state.json) nor a {', '.join(LOADERS)} file; convert it"
        )
    try:
        return datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # arrow, JSON and the library's own errors, some without a common base
        raise UserError(f"{path} cannot be read as a dataset ({first_line(error)}); write it again") from error


def _column(path: Path, row: dict[str, Any], column: str | None) -> str:
    """The column of activations: the one asked for, or the only one of floats with one or two dimensions."""
    floats = {
        name: value
        for name, value in row.items()
        if 1 <= np.ndim(value) <= 2 and np.issubdtype(np.asarray(value).dtype, np.floating)
    }
    if column is None:
        if len(floats) != 1:
            raise UserError(f"name the column of the activations; {path} has {', '.join(floats or row)}")
        return next(iter(floats))
    if column not in floats:
        raise UserError(f"{path} has no column {column!r} of float vectors; {near_matches(column, floats or row)}")
    return column


def _context(stored: int | None, asked: int | None, path: Path) -> int:
    """Rows in a context: those of contexts that are stored, or what single vectors are joined to."""
    if stored is not None and asked not in (None, stored):
        raise UserError(f"{path} holds contexts of {stored} rows, not context_length={asked}; leave it out")
    return stored or asked or 1


def _whole(rows: int, length: int, path: Path) -> None:
    if rows % length:
        raise UserError(
            f"{path} has {rows} rows, which are not a multiple of the context length {length}; give another length"
        )
