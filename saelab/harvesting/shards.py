"""Fill caches shard by shard, as one process or as one of several."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.data.cache import CacheWriter
from saelab.data.cache.manifest import power_of_two
from saelab.data.cache.writer import shard_name
from saelab.data.chat import ROLES, SEPARATOR
from saelab.data.packing import Contexts
from saelab.data.tokenized import UNDIVIDED, Division
from saelab.errors import UserError
from saelab.harvesting.activations import Reader
from saelab.harvesting.background import Background, Beside
from saelab.vocabulary import Vocabulary

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Share:
    """This process's part of a harvest by ``size`` processes: shards ``rank``, ``rank + size``, ...

    Contexts cross the borders of documents, so the model's work is divided by shards: the files are then, byte for
    byte, those that a single process writes. ``wait`` returns once all processes have called it; they write to one
    folder. With ``exchange``, which gives each process's bytes to all, the text is tokenised in parts too (see
    :mod:`saelab.data.tokenized`); without it every process tokenises all of it. ``together`` says that the processes
    are one model, divided over them: all run every pass, and each writes its shards.
    """

    rank: int = 0
    size: int = 1
    wait: Callable[[], object] = lambda: None
    exchange: Callable[[bytes], list[bytes]] | None = None
    together: bool = False

    @property
    def division(self) -> Division:
        """Who tokenises what."""
        return UNDIVIDED if self.exchange is None else Division(self.rank, self.size, self.exchange)


ALONE = Share()


def first_alone(share: Share, work: Callable[[], object]) -> None:
    """Rank 0 does ``work`` while the others wait. Its UserError is raised in all that can be told, so that none of them
    waits for a process that has given up."""
    reason = ""
    if share.rank == 0:
        try:
            work()
        except UserError as error:
            if share.exchange is None:
                raise
            reason = str(error)
    if share.exchange is None:
        share.wait()
    else:
        reason = share.exchange(reason.encode())[0].decode()
    if reason:
        raise UserError(reason)


def open_writers(
    writers: Callable[[], list[CacheWriter]], reader: Reader, first: Contexts, share: Share, gradients: bool
) -> list[CacheWriter]:
    """Open the writers. Rank 0 makes the folders and records what the others need, before they read it."""
    opened: list[CacheWriter] = []
    # A pass that all processes of a divided model must run.
    grads = reader.both(first.tokens, True)[1] if share.together and gradients else None

    def begin() -> None:
        opened.extend(writers())
        # A kill between the shards of two hooks leaves one more of the first: continue with those in common.
        unfinished = [writer.done for writer in opened if not writer.complete]
        common = set.intersection(*unfinished) if unfinished else set()
        for writer in opened:
            writer.keep(common)
        if gradients and any(writer.manifest.grad_scale is None for writer in opened):
            for writer, found in zip(opened, grads or reader.both(first.tokens, True)[1]):
                writer.set_grad_scale(_grad_scale(found))

    first_alone(share, begin)
    return opened or writers()


def fill(
    reader: Reader,
    writers: list[CacheWriter],
    batches: Iterator[Contexts],
    total: int,
    progress: Progress | None,
    share: Share,
) -> None:
    """Write this process's missing shards.

    What follows a pass (picking rows, rounding, checks, statistics, checksums, files) is done by a thread, in the order
    of the passes; the model goes on with the next pass meanwhile.
    """
    unfinished = [writer for writer in writers if not writer.complete]
    if not unfinished:
        return
    settings = writers[0].manifest.settings
    kept, beside = kept_roles(writers[0].manifest.kept_roles), Beside()
    with closing(Background()) as background:
        for number, covered, group in _own_shards(batches, settings["shard_passes"], share):
            if all(number in writer.done for writer in unfinished):
                continue
            parts: list[list[Rows]] = [[] for _ in writers]
            writes = number % share.size == share.rank
            for batch in group:
                covered += batch.tokens.numel()
                acts, grads = reader.both(batch.tokens, settings["gradients"])
                if writes:
                    made = beside.made([*acts, *(grad for grad in grads if grad is not None)])
                    task = _Collect(writers, acts, grads, kept[batch.roles], parts, number, beside, made)
                    background.submit(task)
                    del task
                del acts, grads
                if progress is not None:
                    progress(covered, total)
            if writes:
                background.submit(partial(_write_shard, writers, parts, group, number))
        background.drain()


def _own_shards(batches: Iterator[Contexts], passes: int, share: Share) -> Iterator[tuple[int, int, list[Contexts]]]:
    """Number of a shard, tokens of text before it, and its text, for each shard whose passes this process runs.

    One shard of each process is read before the first of them is computed, because where the text is tokenised in
    parts all processes must reach its next part at about the same time.
    """
    covered, ended = 0, False
    for first in itertools.count(step=share.size):
        own: list[tuple[int, int, list[Contexts]]] = []
        for number in range(first, first + share.size):
            group = list(itertools.islice(batches, passes))
            ended = ended or not group
            if group and (share.together or number % share.size == share.rank):
                own.append((number, covered, group))
            covered += sum(batch.tokens.numel() for batch in group)
        yield from own
        if ended:
            return


@dataclass
class _Collect:
    """The rows of one pass for every writer."""

    writers: list[CacheWriter]
    acts: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    keep: Tensor
    parts: list[list[Rows]]
    number: int
    beside: Beside
    made: dict[torch.device, Any]

    def __call__(self) -> None:
        with self.beside.after(self.made):
            for writer, acts, grads, part in zip(self.writers, self.acts, self.grads, self.parts):
                part.append(_rows(writer, acts, grads, self.keep, part, self.number))


def _write_shard(writers: list[CacheWriter], parts: list[list[Rows]], group: list[Contexts], number: int) -> None:
    columns = [
        torch.cat([getattr(batch, name).flatten() for batch in group]) for name in ("tokens", "documents", "roles")
    ]
    for writer, rows in zip(writers, parts):
        if not writer.complete:
            _write(writer, rows, columns, number)


def kept_roles(names: Sequence[str]) -> Bool[Tensor, " roles"]:
    """Whether tokens of each of ``ROLES`` get a row: those named, or all but separators."""
    return torch.tensor([name in names if names else number != SEPARATOR for number, name in enumerate(ROLES)])


def finish_caches(writers: list[CacheWriter], vocabulary: Vocabulary, left_out: dict[str, int]) -> None:
    """Turn the folders into caches, once all their shards are written."""
    for writer in writers:
        if not writer.complete:
            writer.manifest.left_out = left_out
            writer.write_vocabulary(vocabulary)
            writer.finish()


class Rows(NamedTuple):
    """The rows that one forward pass adds to a shard."""

    acts: Float[Tensor, "rows d_in"]
    grads: Float[Tensor, "rows d_in"] | None
    slots: Int[Tensor, " rows"]  # positions in the pass's text
    tokens: int  # of text in the pass


def _rows(
    writer: CacheWriter, acts: Tensor, grads: Tensor | None, keep: Tensor, before: list[Rows], number: int
) -> Rows:
    """The positions that get a row, of those in ``keep [n_ctx, ctx]``, in the cache's dtype; gradients scaled."""
    manifest, first, shard = writer.manifest, sum(len(part.acts) for part in before), shard_name(number)
    keep = keep.to(acts.device, copy=True)
    keep[:, : manifest.skip_first] = False
    if manifest.max_norm is not None:
        keep &= ~(acts.float().norm(dim=-1) > manifest.max_norm)  # what is no number is not large: it is refused below
    slots = keep.flatten().nonzero().flatten()
    scaled = None
    if grads is not None:
        scaled = grads.flatten(0, 1)[slots].float() * (manifest.grad_scale or 1.0)
        scaled = writer.cast(scaled, "gradients", shard, first)
    stored = writer.cast(acts.flatten(0, 1)[slots], "activations", shard, first)
    return Rows(stored, scaled, slots.cpu(), keep.numel())


def _grad_scale(grads: Tensor | None) -> float:
    """A power of two to scale gradients by, chosen from those of the first pass.

    The largest entry becomes about 16: a factor 4000 below the end of float16, and what is 2^-18 of it (below
    float16's normal numbers without scaling) still has full precision.
    """
    largest = 0.0 if grads is None else float(grads.abs().max())
    return power_of_two(16 / largest) if largest > 0 else 1.0


def _write(writer: CacheWriter, rows: list[Rows], columns: list[Tensor], number: int) -> None:
    offsets = itertools.accumulate((part.tokens for part in rows), initial=0)
    slots = torch.cat([part.slots + offset for part, offset in zip(rows, offsets)])
    grads = [part.grads for part in rows if part.grads is not None]
    acts = torch.cat([part.acts for part in rows])
    text, documents, roles = columns
    writer.write_cast(acts, text, slots, documents, torch.cat(grads) if grads else None, number, roles)
