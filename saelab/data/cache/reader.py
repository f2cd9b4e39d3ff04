"""``ActivationCache``: activations on disk, read in place, shuffled while reading."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.data.cache import feed
from saelab.data.cache.batches import Batch, Buffers, make_batch, moved, stream
from saelab.data.cache.manifest import PARTIAL, REMEDY, Manifest, check_provenance
from saelab.data.cache.order import BLOCK, Order
from saelab.data.cache.same_rows import check_same_rows
from saelab.data.cache.shards import Shards
from saelab.data.cache.storage import Folder
from saelab.data.cache.writer import CacheWriter
from saelab.errors import UserError, damaged
from saelab.layout import MANIFEST, TOKENS
from saelab.vocabulary import Vocabulary

Split = Literal["train", "validation", "held_out", "all"]
WINDOW_BYTES = 256 << 20
BUFFER_BYTES = 8_000_000_000


class ActivationCache:
    """A folder (local or an fsspec URL) of activation shards in corpus order with a manifest.

    Opening reads the manifest and checks that every shard exists with its full size; ``verify=True`` also checks every
    byte against the checksums. ``window_bytes`` bounds the memory that shuffling may use (twice, while the next window
    loads). Of a cache behind a URL the next window is fetched while the present one is used, and ``buffer_bytes`` of
    what was fetched first are kept on the local disk for later passes, as long as the object lives.
    """

    rolled: dict[str, Any] | None = None  # how the training rows are streamed, where they are

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        verify: bool = False,
        window_bytes: int = WINDOW_BYTES,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self.folder = Folder(path, buffer_bytes)
        self.path = self.folder.url
        self.window_bytes = window_bytes
        if self.folder.size(MANIFEST) is None:
            self.folder.check_bucket()
            if self.folder.exists(PARTIAL):
                raise UserError(f"{self.path} is unfinished; run the same `saelab harvest` with --resume")
            raise UserError(f"{self.path} is not an activation cache (no {MANIFEST}); make one with `saelab harvest`")
        self.manifest = Manifest.from_json(self.folder.read(MANIFEST), self.path)
        sizes = self.folder.sizes()
        for shard in self.manifest.shards:
            size = sizes.get(shard.file)
            if size is None:
                raise UserError(f"{self.path}/{shard.file} is missing; restore it or harvest the cache again")
            if size != shard.bytes:
                raise UserError(
                    f"{self.path}/{shard.file} has {size} bytes, the manifest says {shard.bytes}; "
                    "restore it or harvest the cache again"
                )
        self.shards = Shards(self.folder, self.manifest)
        self.target: ActivationCache | None = None  # see with_target
        self._validation = (self.manifest.train_rows, self.manifest.train_rows)
        self._buffers = Buffers()
        if verify:
            self.verify()

    @classmethod
    def from_tensors(
        cls,
        path: str | os.PathLike[str],
        acts: Float[Tensor, "*n d_in"],
        tokens: Int[Tensor, "*n"] | None = None,
        *,
        grads: Float[Tensor, "*n d_in"] | None = None,
        documents: Int[Tensor, "*n"] | None = None,
        context_length: int | None = None,
        dtype: str = "float32",
        held_out: float = 0.05,
        shard_rows: int = 1 << 16,
        grad_scale: float = 1.0,
        vocabulary: list[str] | None = None,
        overwrite: bool = False,
        **provenance: Any,
    ) -> ActivationCache:
        """Write activations that are already in memory.

        ``acts`` is ``[n, d_in]``, or ``[n_contexts, context_length, d_in]`` with ``tokens`` and ``documents`` of the
        same leading shape. Without ``context_length`` a two-dimensional ``acts`` has contexts of one token.
        ``provenance`` are manifest fields such as ``model`` and ``hook_name``.
        """
        check_provenance(provenance)
        context = context_length or (acts.shape[1] if acts.ndim == 3 else 1)
        d_in = acts.shape[-1]
        acts = acts.reshape(-1, d_in)
        n = len(acts)
        text = torch.zeros(n, dtype=torch.int64) if tokens is None else tokens.reshape(-1).cpu()
        owner = torch.arange(n) // context if documents is None else documents.reshape(-1).cpu()
        if not n == len(text) == len(owner):
            raise UserError(f"{n} activations, {len(text)} tokens and {len(owner)} documents must be equally many")
        if grads is not None:
            provenance["grad_scale"] = grad_scale
            grads = grads.reshape(-1, d_in) * grad_scale
        manifest = Manifest(d_in=d_in, dtype=dtype, context_length=context, held_out_fraction=held_out, **provenance)
        with closing(CacheWriter(Folder(path), manifest, overwrite=overwrite)) as writer:
            if vocabulary is not None:
                writer.write_vocabulary(vocabulary)
            step = max(shard_rows // context, 1) * context
            for start in range(0, n, step):
                part = slice(start, start + step)
                slots = torch.arange(len(acts[part]))
                writer.write_shard(acts[part], text[part], slots, owner[part], None if grads is None else grads[part])
            writer.finish()
        return cls(path)

    @property
    def n_rows(self) -> int:
        """Stored activations, over both splits."""
        return self.manifest.n_rows

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.manifest.d_in

    @property
    def hook_name(self) -> str:
        """TransformerLens name of the point in the model."""
        return self.manifest.hook_name

    @property
    def has_grads(self) -> bool:
        """Whether gradients of the loss are stored beside the activations, the target's if there is one."""
        return self.goal.manifest.has_grads

    @property
    def sample_rows(self) -> tuple[int, int]:
        """The span of the rows that initialisation and thresholds are taken from: the training rows."""
        return self.split_rows("train")

    @property
    def goal(self) -> ActivationCache:
        """What an SAE on this cache reconstructs: the target, or the cache itself."""
        return self if self.target is None else self.target

    @property
    def fingerprint(self) -> str:
        """Changes when any activation, its provenance or the split changes; see :meth:`Manifest.fingerprint`."""
        return self.manifest.fingerprint()

    def split_rows(self, split: Split) -> tuple[int, int]:
        """First row of a split and the row after its last."""
        until, first = self._validation
        spans = {"train": (0, until), "validation": (first, self.manifest.train_rows)}
        spans |= {"held_out": (self.manifest.held_out_from, self.n_rows), "all": (0, self.n_rows)}
        if split not in spans:
            raise UserError(f"unknown split {split!r}; choose from {', '.join(spans)}")
        return spans[split]

    def with_validation(self, share: float) -> ActivationCache:
        """The same cache with about the last ``share`` of its training contexts in the split ``validation``, not
        ``train``; whole documents, where there are several.

        That split is empty otherwise. Choices (a learning rate) are made on it, so that the held-out rows, on which
        results are reported, are not part of any choice. The manifest's statistics remain those of all training rows.
        """
        if not 0 < share < 1:
            raise UserError(f"validation={share} must be a share of the training contexts, between 0 and 1")
        contexts = self.shards.context_of(self.manifest.train_rows)
        until, first = self.shards.divide(max(1, round(share * contexts)), contexts)
        return self._with_validation(self.shards.first_row(until), self.shards.first_row(first))

    def with_validation_from(self, row: int) -> ActivationCache:
        """The same cache with the training rows from ``row`` on in the split ``validation``."""
        if not 0 <= row <= self.manifest.train_rows:
            raise UserError(f"validation rows cannot begin at {row}: {self.path} has {self.n_rows} rows")
        return self._with_validation(row, row)

    def with_target(self, target: ActivationCache) -> ActivationCache:
        """The same cache as the input of a transcoder: its batches also carry the activations of ``target``.

        Gradients are then those at the target. Both must come from one harvest: UserError where the rows are not of the
        same tokens of the same text in the same model.
        """
        check_same_rows(self.shards, target.shards)
        view = copy.copy(self)
        view.target, view.shards = target, Shards(self.folder, self.manifest, target.shards)
        return view

    def _with_validation(self, train_until: int, first: int) -> ActivationCache:
        view = copy.copy(self)
        view._validation = (train_until, first)
        return view

    def n_split(self, split: Split) -> int:
        """Rows in a split."""
        first, stop = self.split_rows(split)
        return stop - first

    def spread_rows(self, n: int, split: Split = "all") -> Int[Tensor, " rows"]:
        """``n`` rows of a split, evenly spread from its first to its last; all of them where it has fewer."""
        first, stop = self.split_rows(split)
        # In float32 whole numbers above 2^24 are rounded, also to rows behind the split.
        return torch.linspace(first, stop - 1, min(n, stop - first), dtype=torch.float64).round().long()

    def n_batches(self, batch_size: int, split: Split = "train", drop_last: bool = False) -> int:
        """Batches in one pass over a split."""
        rows = self.n_split(split)
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} must be at least 1")
        if batch_size > rows:
            raise UserError(
                f"batch size {batch_size} exceeds the {rows} rows of the {split} split of {self.path}; "
                "lower the batch size or harvest more tokens"
            )
        return rows // batch_size if drop_last else -(-rows // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        split: Split = "train",
        seed: int | None = 0,
        epoch: int = 0,
        start: int = 0,
        grads: bool = False,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Generator[Batch]:
        """One pass over a split, read ahead in a thread.

        The order is a function of ``(seed, epoch)`` and does not depend on ``batch_size``; ``seed=None`` is corpus
        order. ``start`` is the number of the first batch: a resumed pass continues exactly where it stopped. The
        last batch may be short unless ``drop_last``. With ``device``, activations and gradients are there, and on a
        CUDA device so is the window that they are shuffled in (see :mod:`saelab.data.cache.feed`); the rows and their
        order do not depend on it. With ``part=(i, n)`` only the i-th of n equal parts of each batch is read, and the
        last batch must be whole. Raises UserError when the split is smaller than one batch, or ``grads`` are asked of a
        cache without gradients.
        """
        count, parts = self.n_batches(batch_size, split, drop_last), part[1]
        end = min(count * batch_size, self.n_split(split))
        if batch_size % parts or (end % batch_size and parts > 1):
            raise UserError(f"batches of {batch_size} rows, the last one too, must divide over {parts} processes")
        span = start * batch_size // parts, end // parts, batch_size // parts
        options: dict[str, Any] = {"split": split, "seed": seed, "epoch": epoch, "grads": grads, "device": device}
        return self.rows_of_pass(*span, part=part, **options)

    def rows_of_pass(
        self,
        start: int,
        end: int,
        batch_size: int,
        *,
        head: int | None = None,
        part: tuple[int, int] = (0, 1),
        split: Split = "train",
        seed: int | None = 0,
        epoch: int = 0,
        grads: bool = False,
        device: torch.device | str | None = None,
    ) -> Generator[Batch]:
        """Rows ``start : end``, of the process's own, of the pass that :meth:`batches` describes; the first batch has
        ``head`` rows where that is given, and the last may be short."""
        self._need_grads(grads)
        first, stop = self.split_rows(split)
        names = self._names(grads)
        window_blocks = max(self.window_bytes // (self.shards.row_bytes(names) * BLOCK), 1)
        order = Order(first, stop - first, seed, epoch, window_blocks, batch_size * part[1], *part)
        span = batch_size, start, end, head
        transport = feed.transport_for(device, feed.window_bytes(self.shards, order, names))
        if transport is not None:
            return feed.feed(self.shards, transport, order, names, *span)
        batches = stream(self.shards, self._buffers, order, names, *span)
        return batches if device is None or torch.device(device).type == "cpu" else moved(batches, device)

    def head(
        self,
        n: int | None = None,
        batch_size: int = 4096,
        *,
        split: Split = "all",
        seed: int | None = None,
        grads: bool = False,
    ) -> Generator[Batch]:
        """The first ``n`` rows of a split (all of them by default, or where it holds fewer), in batches.

        ``seed=None`` is corpus order; see :meth:`batches`. Nothing after the last of these rows is read. Raises
        UserError if there is no row to read.
        """
        rows = self.n_split(split)
        left = rows if n is None else min(n, rows)
        if left < 1:
            raise UserError(
                f"no row of the {split} split of {self.path} is to be read: it holds {rows}, n={n} are wanted"
            )
        with closing(self.batches(min(batch_size, left), split=split, seed=seed, grads=grads)) as batches:
            for batch in batches:
                yield Batch(*(None if column is None else column[:left] for column in batch))  # pyright: ignore[reportArgumentType]
                left -= len(batch.acts)
                if left <= 0:
                    return

    def _names(self, grads: bool) -> tuple[str, ...]:
        target = () if self.target is None else ("target",)
        return ("acts", "tokens", *target, "grads") if grads else ("acts", "tokens", *target)

    def _need_grads(self, grads: bool) -> None:
        if grads and not self.has_grads:
            raise UserError(f"{self.goal.path} holds no gradients; harvest it again with --gradients")

    def read(self, rows: Int[Tensor, " n"] | Sequence[int], *, grads: bool = False) -> Batch:
        """The given rows, in the given order; with their gradients if ``grads``."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        self._need_grads(grads)
        return make_batch(self.shards, self.shards.gather(rows, self._names(grads)) | {"rows": rows})

    def release(self) -> None:
        """Unmap the files, whose pages count as this process's memory; they are mapped again when they are read."""
        self.shards.release()

    def tokens_window(self, row: int, before: int, after: int) -> tuple[Int[Tensor, " m"], int]:
        """Token ids around a row, cut at the borders of its own context, and the row's offset in them."""
        shard, slot = self.shards.slot(row)
        text = self.shards.columns(shard)["text"]
        context = slot - slot % self.manifest.context_length
        start = max(context, slot - before)
        stop = min(context + self.manifest.context_length, slot + after + 1, text.shape[0])
        return text.slices([(start, stop)])[0].long(), slot - start

    def document(self, row: int) -> int:
        """Number of the document that a row's token belongs to."""
        shard, slot = self.shards.slot(row)
        number = self.shards.columns(shard)["documents"].slices([(slot, slot + 1)])[0]
        return int(number) + self.manifest.shards[shard].document_offset

    def documents(self, split: Split = "all", n: int | None = None) -> Int[Tensor, " rows"]:
        """The number of the document of each of the first ``n`` rows of a split (all by default)."""
        first, stop = self.split_rows(split)
        return self.shards.documents(first, stop if n is None else min(stop, first + n))

    def document_numbers(self, split: Split = "all", n: int | None = None) -> Int[Tensor, " documents"]:
        """The numbers of the documents that the first ``n`` rows of a split are of, ascending."""
        first, stop = self.split_rows(split)
        return self.shards.document_numbers(first, stop if n is None else min(stop, first + n))

    @property
    def n_vocabulary(self) -> int:
        """Tokens in the vocabulary that is stored with the cache; 0 without one."""
        return len(self.vocabulary)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The text of each token id; empty where none is stored with the cache."""
        if not self.folder.exists(TOKENS):
            return Vocabulary([])
        with damaged(f"{self.path}/{TOKENS}", REMEDY):
            return Vocabulary.from_json(self.folder.read(TOKENS))

    def token_strings(self, tokens: Int[Tensor, " n"] | Sequence[int]) -> list[str]:
        """The text of each token of a run of text; needs no model. Joined they are the text: a character that several
        tokens share is shown with the last of them. Without a vocabulary the text of a token is its id."""
        return self.vocabulary.side_by_side(torch.as_tensor(tokens).tolist())

    def contexts(self, split: Split = "train") -> Iterator[tuple[Int[Tensor, " m"], Int[Tensor, " m"]]]:
        """For each context of a split: its token ids, and the cache row of each token (-1 where none is stored)."""
        first, stop = self.split_rows(split)
        yield from self.shards.contexts(first, stop)

    def shard_texts(self) -> Iterator[tuple[Int[Tensor, " t"], Int[Tensor, " t"], Int[Tensor, " rows"]]]:
        """For each shard, in corpus order: its token ids, the document number of each, and the place of each of its
        rows among them."""
        for index, shard in enumerate(self.manifest.shards):
            columns = self.shards.columns(index)
            text, documents, slots = (columns[name].all() for name in ("text", "documents", "slots"))
            yield text, documents + shard.document_offset, slots

    def shard_roles(self) -> Iterator[Int[Tensor, " t"]]:
        """For each shard, in corpus order: the number in ``ROLES`` of the role of each of its tokens."""
        for index, shard in enumerate(self.manifest.shards):
            column = self.shards.columns(index).get("roles")
            yield torch.zeros(shard.tokens, dtype=torch.int8) if column is None else column.all()

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every byte of every shard against the manifest; UserError names the first shard that differs."""
        for done, shard in enumerate(self.manifest.shards, 1):
            if self.folder.sha256(shard.file) != shard.sha256:
                raise UserError(f"{self.path}/{shard.file} is corrupted (checksum differs); harvest the cache again")
            if progress is not None:
                progress(done, len(self.manifest.shards))
