"""Writing an activation cache, one atomic shard at a time."""

from __future__ import annotations

import hashlib
import json
import math

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache.manifest import DTYPES, MANIFEST, PARTIAL, VOCABULARY, Manifest, ShardInfo
from saelab.data.cache.storage import Folder
from saelab.errors import UserError

_CHUNK = 8192  # rows per float64 chunk of the statistics


class CacheWriter:
    """Appends shards to a cache folder; ``finish`` computes statistics and marks the cache complete.

    After each shard a partial manifest is written, so a killed harvest continues at the next shard: pass
    ``resume=True`` and skip what ``manifest.n_contexts`` already covers. ``complete`` says that nothing is missing.
    """

    def __init__(self, folder: Folder, manifest: Manifest, *, overwrite: bool = False, resume: bool = False) -> None:
        if manifest.dtype not in DTYPES:
            raise UserError(f"dtype {manifest.dtype!r} is not one a cache can hold; choose from {', '.join(DTYPES)}")
        if not 0 <= manifest.held_out_fraction < 1:
            raise UserError(f"held-out fraction {manifest.held_out_fraction} must be at least 0 and below 1")
        self.folder, self.manifest = folder, manifest
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        prepare(folder, overwrite=overwrite, resume=resume)
        self.complete = resume and folder.exists(MANIFEST)
        if self.complete or (resume and folder.exists(PARTIAL)):
            text = folder.read(MANIFEST if self.complete else PARTIAL).decode()
            self._continue(Manifest.from_json(text, folder.url))
        else:
            self._save()

    def _continue(self, found: Manifest) -> None:
        before, now = found.identity(), self.manifest.identity()
        if changed := [name for name in now if now[name] != before[name]]:
            name = changed[0]
            raise UserError(
                f"cannot resume {self.folder.url}: its {name} is {before[name]!r}, this harvest has {now[name]!r}; "
                "use the same settings or start over with overwrite"
            )
        for shard in found.shards:
            if self.folder.size(shard.file) != shard.bytes:
                raise UserError(f"cannot resume {self.folder.url}: {shard.file} is missing or truncated; start over")
        self.manifest = found

    def _save(self) -> None:
        self.folder.write(PARTIAL, self.manifest.to_json().encode())

    def write_shard(
        self,
        acts: Float[Tensor, "rows d_in"],
        text: Int[Tensor, " tokens"],
        slots: Int[Tensor, " rows"],
        documents: Int[Tensor, " tokens"],
        grads: Float[Tensor, "rows d_in"] | None = None,
    ) -> None:
        """Append rows; ``acts[i]`` belongs to ``text[slots[i]]``, and context ``c`` of the shard is
        ``text[c * context_length : (c + 1) * context_length]``. ``grads`` are already scaled by ``grad_scale``."""
        name = self._next_shard()
        stored = self.storable(acts, "activations")
        tensors = {
            "acts": stored,
            "tokens": text[slots].to(torch.int32),
            "text": text.to(torch.int32).contiguous(),
            "slots": slots.to(torch.int32).contiguous(),
            "documents": documents.to(torch.int32).contiguous(),
        }
        if grads is not None:
            tensors["grads"] = self.storable(grads, "gradients")
        tensors["sum"], tensors["moments"] = sums(stored)
        data = safetensors.torch.save(tensors)
        self.folder.write(name, data)
        contexts = math.ceil(text.numel() / self.manifest.context_length)
        digest = hashlib.sha256(data).hexdigest()
        self.manifest.shards.append(ShardInfo(name, len(acts), text.numel(), contexts, digest, len(data)))
        self.manifest.n_documents = int(documents.max()) + 1
        self._save()

    def _next_shard(self) -> str:
        return f"shard_{len(self.manifest.shards):05d}.safetensors"

    def storable(self, values: Tensor, what: str, first: int = 0) -> Tensor:
        """``values`` in the cache's dtype, refused when not finite before or after rounding.

        ``first`` is the row of the next shard that ``values`` begin at, for the message.
        """
        stored = values.detach().to(self.dtype).cpu().contiguous()
        shard = self._next_shard()
        if not stored.isfinite().all():
            row = int((~stored.isfinite().all(1)).nonzero()[0])
            if values[row].isfinite().all():
                largest = float(values[row].abs().max())
                raise UserError(
                    f"{what} of row {first + row} of {shard} reach {largest:.3g}, too large for {self.manifest.dtype}; "
                    "use bfloat16 or float32, or drop such tokens with max_norm"
                )
            raise UserError(f"{what} are not finite in {shard}, row {first + row}; check the model in a wider dtype")
        return stored

    def write_vocabulary(self, strings: list[str]) -> None:
        """How each token id reads, so that the cache can be shown without its model."""
        self.folder.write(VOCABULARY, json.dumps(strings, ensure_ascii=False).encode())

    def truncate(self, n_shards: int) -> None:
        """Forget shards from ``n_shards`` on: they are written again. Leaves a complete cache alone."""
        if self.complete:
            return
        del self.manifest.shards[n_shards:]
        self._save()

    def finish(self) -> Manifest:
        """Record the held-out split and the training rows' statistics; the cache can now be opened."""
        finish(self.folder, self.manifest)
        publish(self.folder, self.manifest)
        self.complete = True
        return self.manifest


def prepare(folder: Folder, *, overwrite: bool, resume: bool, dry: bool = False) -> None:
    """Refuse a folder that holds anything, unless told to replace or continue the cache in it.

    ``dry`` only asks: nothing is removed yet.
    """
    names = folder.names()
    if not names or resume:
        return
    if not overwrite:
        raise UserError(f"{folder.url} already exists; pass overwrite to replace it or resume to continue it")
    if not {MANIFEST, PARTIAL} & set(names):
        raise UserError(f"{folder.url} is not an activation cache and is not overwritten; choose another folder")
    if dry:
        return
    for name in (MANIFEST, PARTIAL, VOCABULARY):
        folder.remove(name)
    for name in names:
        if name.startswith(("shard_", ".shard_")):
            folder.remove(name)


def sums(acts: Float[Tensor, "rows d_in"]) -> tuple[Float[Tensor, " d_in"], Float[Tensor, 2]]:
    """Float64 sum of the rows, and of their squared norms and norms."""
    total = torch.zeros(acts.shape[1], dtype=torch.float64)
    moments = torch.zeros(2, dtype=torch.float64)
    for chunk in acts.split(_CHUNK):
        x = chunk.double()
        squared = x.square().sum(1)
        total += x.sum(0)
        moments += torch.stack([squared.sum(), squared.sqrt().sum()])
    return total, moments


def finish(folder: Folder, manifest: Manifest) -> None:
    """Fill in everything in ``manifest`` that depends on all shards."""
    n_rows = manifest.n_rows
    if n_rows == 0:
        raise UserError(f"{folder.url} would hold no rows; give more text or a shorter context")
    manifest.held_out_from = _held_out_row(folder, manifest)
    training = manifest.held_out_from or n_rows
    total, moments = torch.zeros(manifest.d_in, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    first = 0
    for shard in manifest.shards:
        columns = folder.tensors(shard.file)
        if first + shard.rows <= training:
            part = columns["sum"].all(), columns["moments"].all()
        else:
            part = sums(columns["acts"].slices([(0, max(training - first, 0))])[0])
        total, moments = total + part[0], moments + part[1]
        first += shard.rows
    manifest.set_statistics(training, total.tolist(), *moments.tolist())


def publish(folder: Folder, manifest: Manifest) -> None:
    """Write the manifest that makes the folder a cache."""
    folder.write(MANIFEST, manifest.to_json().encode())
    folder.remove(PARTIAL)


def _held_out_row(folder: Folder, manifest: Manifest) -> int:
    """The first row of the last ``held_out_fraction`` of the contexts (at least one context)."""
    if manifest.held_out_fraction == 0:
        return manifest.n_rows
    keep = manifest.n_contexts - max(1, round(manifest.held_out_fraction * manifest.n_contexts))
    row = 0
    for shard in manifest.shards:
        if keep < shard.contexts:
            slots = folder.tensors(shard.file)["slots"].all()
            return row + int(torch.searchsorted(slots, keep * manifest.context_length))
        keep -= shard.contexts
        row += shard.rows
    return row
