"""Writing an activation cache, one atomic shard at a time."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache.manifest import OTHERS, PARTIAL, Manifest, ShardInfo, partial_name
from saelab.data.cache.shards import Shards
from saelab.data.cache.storage import Folder
from saelab.data.chat import ROLES, SEPARATOR
from saelab.devices import DTYPES
from saelab.errors import UserError
from saelab.files import remove_partial
from saelab.layout import MANIFEST, TOKENS
from saelab.vocabulary import Vocabulary

_CHUNK = 8192  # rows per float64 chunk of the statistics
TOO_MANY = 3  # times as many held-out contexts as asked for are worth a warning
_log = logging.getLogger(__name__)


class CacheWriter:
    """Writes the shards of a cache folder; ``finish`` computes statistics and marks the cache complete.

    After each shard a partial manifest is written, so that a killed harvest can continue: pass ``resume=True`` and
    write the shards whose number is not in ``done``. ``complete`` is true when no shard is missing. Several processes
    may write one cache, each its own shards: rank 0 opens the folder first, and finishes it when all have written
    theirs. Rank 0 also locks the folder until ``close``, which ``finish`` and ``discard`` call.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, *, overwrite: bool = False, resume: bool = False, rank: int = 0
    ) -> None:
        if manifest.dtype not in DTYPES:
            raise UserError(f"dtype {manifest.dtype!r} is not one a cache can hold; choose from {', '.join(DTYPES)}")
        if not 0 <= manifest.held_out_fraction < 1:
            raise UserError(f"held-out fraction {manifest.held_out_fraction} must be at least 0 and below 1")
        self.folder, self.manifest, self.rank = folder, manifest, rank
        self.dtype: torch.dtype = getattr(torch, manifest.dtype)
        self._locked = ExitStack()
        try:
            self._open(overwrite, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, overwrite: bool, resume: bool) -> None:
        folder, rank = self.folder, self.rank
        if rank == 0:
            self._locked.enter_context(folder.lock())
            prepare(folder, overwrite=overwrite, resume=resume)
            if folder.local is not None:
                remove_partial(folder.local)
        begun = resume or rank > 0
        self.complete = begun and folder.exists(MANIFEST)
        if self.complete or (begun and folder.exists(PARTIAL)):
            text = folder.read(MANIFEST if self.complete else PARTIAL).decode()
            self._continue(Manifest.from_json(text, folder.url))
        elif rank == 0:
            try:
                self._save()
            except OSError:
                discard(folder)
                raise
        self.done = {shard.number for shard in self.manifest.shards}
        if rank > 0:
            self.manifest = replace(self.manifest, shards=[])  # rank 0 keeps recording those that it has

    def _continue(self, found: Manifest) -> None:
        before, now = found.identity(), self.manifest.identity()
        if changed := [name for name in now if now[name] != before[name]]:
            name = changed[0]
            raise UserError(
                f"cannot resume {self.folder.url}: its {name} is {before[name]!r}, this harvest has {now[name]!r}; "
                "use the same settings or start over with overwrite"
            )
        self.manifest = found
        if self.rank == 0 and not self.complete:
            self._collect()
        sizes = self.folder.sizes()
        for shard in self.manifest.shards:
            if sizes.get(shard.file) != shard.bytes:
                raise UserError(f"cannot resume {self.folder.url}: {shard.file} is missing or truncated; start over")

    def _collect(self) -> None:
        """Take over the shards that the other processes have recorded."""
        others = [name for name in self.folder.names() if name.startswith(OTHERS)]
        parts = [Manifest.from_json(self.folder.read(name), self.folder.url) for name in others]
        shards = {shard.number: shard for part in [*parts, self.manifest] for shard in part.shards}
        self.manifest.shards = [shards[number] for number in sorted(shards)]
        self.manifest.n_documents = max(part.n_documents for part in [*parts, self.manifest])
        self.manifest.roles = max((part.roles for part in [*parts, self.manifest]), key=len)
        self._save()
        for name in others:
            self.folder.remove(name)

    def _save(self) -> None:
        self.folder.write(partial_name(self.rank), self.manifest.to_json().encode())

    def write_shard(
        self,
        acts: Float[Tensor, "rows d_in"],
        text: Int[Tensor, " tokens"],
        slots: Int[Tensor, " rows"],
        documents: Int[Tensor, " tokens"],
        grads: Float[Tensor, "rows d_in"] | None = None,
        number: int | None = None,
        roles: Int[Tensor, " tokens"] | None = None,
    ) -> None:
        """Write shard ``number``, by default the one after the last.

        ``acts[i]`` belongs to ``text[slots[i]]``, and context ``c`` of the shard is
        ``text[c * context_length : (c + 1) * context_length]``. ``grads`` are already scaled by ``grad_scale``.
        Raises UserError for values that are not finite in the cache's dtype.
        """
        number = max(self.done, default=-1) + 1 if number is None else number
        name = shard_name(number)
        scaled = None if grads is None else self.cast(grads, "gradients", name)
        self.write_cast(self.cast(acts, "activations", name), text, slots, documents, scaled, number, roles)

    def write_cast(
        self,
        acts: Float[Tensor, "rows d_in"],
        text: Int[Tensor, " tokens"],
        slots: Int[Tensor, " rows"],
        documents: Int[Tensor, " tokens"],
        grads: Float[Tensor, "rows d_in"] | None,
        number: int,
        roles: Int[Tensor, " tokens"] | None = None,
    ) -> None:
        """``write_shard`` for ``acts`` and ``grads`` that :meth:`cast` returned; ``roles`` are numbers in ``ROLES``."""
        name = shard_name(number)
        if not len(acts):
            raise UserError(f"{name} would hold no row: too few tokens are kept; keep more, or make shards larger")
        for document in (int(documents.min()), int(documents.max())):
            if not 0 <= document < 1 << 31:
                raise UserError(f"{name} has a document number {document}; number the documents from 0")
        tensors = {
            "acts": acts,
            "tokens": text[slots].to(torch.int32),
            "text": text.to(torch.int32).contiguous(),
            "slots": slots.to(torch.int32).contiguous(),
            "documents": documents.to(torch.int32).contiguous(),
        }
        if grads is not None:
            tensors["grads"] = grads
        if roles is not None and bool((roles > SEPARATOR).any()):
            tensors["roles"] = roles.to(torch.int8).contiguous()
            self.manifest.roles = list(ROLES)
        tensors["sum"], tensors["moments"] = sums(acts)
        data = safetensors.torch.save(tensors)
        self.folder.write(name, data)
        contexts = math.ceil(text.numel() / self.manifest.context_length)
        digest = hashlib.sha256(data).hexdigest()
        self.manifest.shards.append(ShardInfo(name, len(acts), text.numel(), contexts, digest, len(data)))
        self.manifest.n_documents = max(self.manifest.n_documents, int(documents.max()) + 1)
        self.done.add(number)
        self._save()

    def cast(
        self, values: Float[Tensor, "rows d_in"], what: str, shard: str, first: int = 0
    ) -> Float[Tensor, "rows d_in"]:
        """``values`` in the cache's dtype on the CPU. Raises UserError if one is not finite before or after rounding.

        ``first`` is the row of ``shard`` that ``values`` begin at, for the message.
        """
        stored = _on_cpu(values.detach().to(self.dtype)).contiguous()
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

    def write_vocabulary(self, strings: Sequence[str]) -> None:
        """Store the text of each token id, so that the cache can be shown without its model."""
        found = strings if isinstance(strings, Vocabulary) else Vocabulary(strings)
        self.folder.write(TOKENS, found.to_json().encode())

    def set_grad_scale(self, scale: float) -> None:
        """Record the factor by which gradients are multiplied, for the remaining shards; a scale already set stays."""
        if self.manifest.grad_scale is None:
            self.manifest.grad_scale = scale
            self._save()

    def keep(self, done: set[int]) -> None:
        """Forget the shards that are not in ``done``: they are written again. Leaves a complete cache alone."""
        if self.complete or done == self.done:
            return
        self.manifest.shards = [shard for shard in self.manifest.shards if shard.number in done]
        self.done = set(done)
        self._save()

    def finish(self) -> Manifest:
        """Record the held-out split and the training rows' statistics; the cache can now be opened."""
        self._collect()
        if missing := set(range(len(self.manifest.shards))) - {shard.number for shard in self.manifest.shards}:
            raise UserError(f"{self.folder.url} lacks {shard_name(min(missing))}; run the same harvest with --resume")
        complete_manifest(self.folder, self.manifest)
        publish(self.folder, self.manifest)
        self.complete = True
        self.close()
        return self.manifest

    def close(self) -> None:
        """Release the lock on the folder. An unfinished cache can be resumed."""
        self._locked.close()

    def discard(self) -> None:
        """Remove a cache that will not be finished, and its folder if nothing else is in it."""
        discard(self.folder)
        self.close()


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def prepare(folder: Folder, *, overwrite: bool, resume: bool, dry: bool = False) -> None:
    """Refuse a folder that is not empty, unless the cache in it shall be replaced or continued.

    With ``dry`` it only checks: nothing is removed yet.
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
    discard(folder)


def discard(folder: Folder) -> None:
    """Remove the files of a cache."""
    for name in (MANIFEST, PARTIAL, TOKENS):  # in this order: a kill leaves no complete cache
        folder.remove(name)
    for name in folder.names():
        if name.startswith(("shard_", OTHERS)):
            folder.remove(name)
    if folder.local is not None:
        remove_partial(folder.local)


def _on_cpu(values: Tensor) -> Tensor:
    """From a GPU through pinned memory: only the current stream is waited for, and the copy takes half the time."""
    if not values.is_cuda:
        return values.cpu()
    copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return copied


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


def complete_manifest(folder: Folder, manifest: Manifest) -> None:
    """Fill in everything in ``manifest`` that depends on all shards."""
    n_rows = manifest.n_rows
    if n_rows == 0:
        raise UserError(f"{folder.url} would hold no rows; give more text or a shorter context")
    _hold_out(folder, manifest)
    training = manifest.train_rows or n_rows
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


def _hold_out(folder: Folder, manifest: Manifest) -> None:
    """Hold out the last documents: those of about ``held_out_fraction`` of the contexts."""
    manifest.held_out_from, manifest.train_until = manifest.n_rows, None
    if manifest.held_out_fraction == 0:
        return
    shards, asked = Shards(folder, manifest), max(1, round(manifest.held_out_fraction * manifest.n_contexts))
    stop, start = shards.divide(asked, manifest.n_contexts)
    if manifest.n_contexts - start > TOO_MANY * asked:
        _log.warning(
            "%s: %d of the %d contexts are held out, where %d were asked for, because documents are held out whole and "
            "the last ones are long; take less of each (--document-tokens), or give short ones last",
            *(folder.url, manifest.n_contexts - start, manifest.n_contexts, asked),
        )
    manifest.held_out_from = shards.first_row(start)
    if stop < start:
        manifest.train_until = shards.first_row(stop)
