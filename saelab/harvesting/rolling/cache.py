"""``roll``: a cache whose training rows are harvested while they are read, on a bounded part of the disk."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from saelab.data.cache import ActivationCache, Batch
from saelab.data.cache.reader import WINDOW_BYTES, Split
from saelab.data.cache.storage import Folder
from saelab.data.cache.writer import prepare
from saelab.data.packing import BEGINNING, Bos, Packed, Place, pack, resolve_bos, resolve_separator
from saelab.data.text import TextSource, open_text
from saelab.errors import Stopped, UserError
from saelab.harvesting.activations import Reader
from saelab.harvesting.pipeline import harvest_into
from saelab.harvesting.rolling.config import BLOCK, RollingConfig, Window
from saelab.harvesting.rolling.disk import Bounded, Disk, Record
from saelab.harvesting.rolling.passes import Passes, first_pass
from saelab.harvesting.rolling.producer import Harvester, Producer
from saelab.layout import ROLLING
from saelab.lm.loading import load_model
from saelab.lm.offload import device_of
from saelab.lm.sites import locate
from saelab.lm.structure import underlying
from saelab.lm.tokens import vocabulary

Report = Callable[[str, int, int], None]  # what, done, total


def never() -> bool:
    return False


def quiet(what: str, done: int, total: int) -> None:
    pass


class RollingCache(ActivationCache):
    """A cache of kept documents with a stream of training rows that is harvested as it is read.

    All but the split ``train`` is that of the folder's ordinary cache: its statistics, its sample (``sample_rows``) and
    its held-out rows. The split ``train`` has ``config.tokens`` rows, which can be read once, from any batch on, by
    :meth:`batches` alone: the rows of each segment in the shuffled order of a cache of its own, whose epoch is the
    number of the segment. Use it in a ``with`` block, which ends with the folder unlocked and, when the stream was read
    to its end, without segments.
    """

    def __init__(self, folder: Path, config: RollingConfig, window: Window, record: Record, window_bytes: int) -> None:
        super().__init__(folder, window_bytes=window_bytes)
        self.config, self.window, self.record = config, window, record
        self.disk = Disk(folder, config.limit, window.bytes)
        self.report: Report = quiet
        self.stop: Callable[[], bool] = never
        self._begin: Callable[[], tuple[Harvester, Passes]] | None = None
        self._locked, self._read_all = ExitStack(), False
        self.model: Any = None

    @property
    def rolled(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What a run records of its stream."""
        first, stop = self.sample_rows
        options = {name: value for name, value in asdict(self.config).items() if value != getattr(RollingConfig, name)}
        return {
            "text": self.manifest.text,
            "tokens": self.config.tokens,
            "window_tokens": self.window.passes * self.config.pass_size,
            "sample_rows": stop - first,
            "held_out_rows": self.n_split("held_out"),
            "shares_document": self.record.shares_document,
            "options": json.loads(json.dumps(options)),  # of the configuration, where they are not the defaults
        }

    @property
    def sample_rows(self) -> tuple[int, int]:
        """First row of the kept sample and the row after its last."""
        return super().split_rows("train")

    def split_rows(self, split: Split) -> tuple[int, int]:
        """First row of a split of the kept cache and the row after its last; UserError for the stream."""
        if split == "train":
            raise UserError(
                f"the training rows of {self.path} are a stream, of which only batches can be read; open the folder as "
                "an ActivationCache to read its sample"
            )
        return super().split_rows(split)

    def n_split(self, split: Split) -> int:
        """Rows in a split."""
        return self.config.tokens if split == "train" else super().n_split(split)

    def with_validation(self, share: float) -> ActivationCache:
        """Refused: a stream is read once."""
        raise UserError("rates are tuned on rows that are read several times; tune on a cache of the same text")

    def with_validation_from(self, row: int) -> ActivationCache:
        """Refused, as :meth:`with_validation`."""
        return self.with_validation(0.5)

    def with_target(self, target: ActivationCache) -> ActivationCache:
        """Refused: one place of the model is harvested."""
        raise UserError(
            "a transcoder needs the activations of two places, and a rolling cache has one; harvest two caches"
        )

    def head(
        self,
        n: int | None = None,
        batch_size: int = 4096,
        *,
        split: Split = "all",
        seed: int | None = None,
        grads: bool = False,
    ) -> Generator[Batch]:
        """The first rows of a split of the kept cache, in batches."""
        self.split_rows(split)  # which refuses the stream
        return super().head(n, batch_size, split=split, seed=seed, grads=grads)

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
        """Batches as of any cache; those of the split ``train`` are harvested meanwhile. ``rows`` are numbers in the
        stream."""
        if split != "train":
            options: dict[str, Any] = {"grads": grads, "drop_last": drop_last, "device": device, "part": part}
            return super().batches(batch_size, split=split, seed=seed, epoch=epoch, start=start, **options)
        if part[1] > 1:
            raise UserError(f"the stream of {self.path} has one reader; train in one process")
        if epoch:
            raise UserError(f"epoch={epoch}: the stream of {self.path} is read once; use epochs=1 and more tokens")
        count = self.n_batches(batch_size, "train", drop_last)
        end = min(count * batch_size, self.config.tokens)
        return self._stream(start * batch_size, end, batch_size, {"seed": seed, "grads": grads, "device": device})

    def _stream(self, at: int, end: int, size: int, options: dict[str, Any]) -> Generator[Batch]:
        """Rows ``at : end`` of the stream."""
        if self._begin is None:
            raise UserError(f"{self.path} is closed; open it again with roll(..., resume=True)")
        harvester, passes = self._begin()
        paced = device_of(self.model).type == "cpu" and torch.device(options["device"] or "cpu").type == "cpu"
        first, report = self.record.segment_of(at), self.report
        producer = Producer(harvester, passes, first, paced, self.stop, lambda n: report("harvest", min(n, end), end))
        open_batch: list[Batch] = []  # rows at the end of a segment that do not fill a batch
        with closing(producer):
            for number in itertools.count(first):
                if at >= end:
                    break
                if not producer.wait(number):
                    raise UserError(f"the stream of {self.path} ended after {at:,} of {end:,} rows; start again")
                for batch in self._segment(number, at, end, size, open_batch, options):
                    at += len(batch.rows)
                    done = (at - self.record.first_row(number)) / self.record.segments[number].rows
                    if (whole := _join([*open_batch, batch])).rows.numel() == size or at == end:
                        open_batch.clear()
                        yield whole
                    else:
                        open_batch[:] = [whole]
                    producer.pace(min(done, 1.0))
        self._read_all = True

    def _segment(
        self, number: int, at: int, end: int, size: int, open_batch: list[Batch], options: dict[str, Any]
    ) -> Iterator[Batch]:
        """The rows of a segment from row ``at`` of the stream on; the first ones complete ``open_batch``."""
        segment, base = self.disk.segment(number, self.window_bytes), self.record.first_row(number)
        stop, head = min(segment.n_rows, end - base), size - sum(len(batch.rows) for batch in open_batch)
        if at - base >= stop:
            return
        try:
            with closing(segment.rows_of_pass(at - base, stop, size, head=head, epoch=number, **options)) as batches:
                for batch in batches:
                    yield batch._replace(rows=batch.rows + base)
        finally:
            segment.release()  # else the files stay on disk after they are removed

    def watch(self, report: Report, stop: Callable[[], bool]) -> None:
        """Call ``report`` with what is harvested, and raise Stopped where ``stop`` is true while a segment is waited
        for; from the next pass over the stream on."""
        self.report, self.stop = report, stop

    @property
    def kept(self) -> ActivationCache:
        """The ordinary cache of the sample and of the held-out documents."""
        return ActivationCache(self.path, window_bytes=self.window_bytes)

    def close(self) -> None:
        """Unlock the folder, and remove the segments where the stream was read to its end."""
        if self._begin is not None and self._read_all:
            self.disk.clear()
        self._begin = None
        self._locked.close()

    def __enter__(self) -> RollingCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(*(None if columns[0] is None else torch.cat(columns) for columns in zip(*batches)))  # pyright: ignore[reportArgumentType]


def roll(
    model: Any,
    hook: str,
    text: str | Path | TextSource,
    out: Path | str | os.PathLike[str],
    config: RollingConfig | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Report | None = None,
    stop: Callable[[], bool] | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> RollingCache:
    """A cache at ``out`` whose training rows are harvested from ``text`` while they are read.

    ``model`` is a loaded model or a name for :func:`load_model`, ``text`` a source or a name for :func:`open_text`. The
    kept documents are harvested at once, the others when the cache is trained on. The rows and their order are fixed by
    model, text, hook point and the settings of ``config`` other than ``cache_gb``. With ``resume`` the folder of an
    interrupted run is continued; segments that were removed meanwhile are harvested again. ``progress`` is called with
    (what, done, total). Where ``stop`` returns true while the training waits for a segment, Stopped is raised. Raises
    UserError, before anything is written, for every invalid input.
    """
    config, folder = config or RollingConfig(), Folder(out)
    if folder.local is None:
        raise UserError(f"{folder.url} is no local folder, which the segments of a rolling cache need; choose one")
    stop, report = stop or never, progress or quiet
    model = load_model(model) if isinstance(model, str) else model
    source = text if isinstance(text, TextSource) else open_text(text)

    def watched(what: str, done: int, total: int) -> None:
        report(what, done, total)
        if stop():
            raise Stopped

    with ExitStack() as stack:
        stack.enter_context(folder.lock())
        stream = _Stream(model, hook, source, cast(RollingConfig, config.sized(underlying(model))))
        cache = stream.prepared(folder.local, overwrite, resume, watched, window_bytes)
        cache.report, cache.stop, cache._locked = report, stop, stack.pop_all()
    return cache


class _Stream:
    """A text, a model and a hook point, checked."""

    def __init__(self, model: Any, hook: str, source: TextSource, config: RollingConfig) -> None:
        self.model, self.hook, self.source, self.config = model, hook, source, config
        self.bos: Bos = resolve_bos(config.bos, model.tokenizer)
        self.separator = resolve_separator(config.separator, model.tokenizer, self.bos)
        self.reader, first = Reader(model, [locate(model, hook)]), next(self.packed(), None)
        if first is None:
            raise UserError(
                f"{source.name} is shorter than one context of {config.context_length} tokens; give more text"
            )
        self.reader.use_plain_model(first.tokens[:1], config.skip_first)
        (self.d_in,) = self.reader.widths(first.tokens[:1])

    def packed(self, at: Place = BEGINNING) -> Packed:
        """The forward passes of the text, from a place on."""
        config, tokenizer = self.config, self.model.tokenizer
        return pack(
            self.source, tokenizer, config.context_length, self.bos, config.pass_contexts, self.separator,
            config.document_tokens, at=at,
        )  # fmt: skip

    def prepared(self, root: Path, overwrite: bool, resume: bool, report: Report, window_bytes: int) -> RollingCache:
        """Harvest the kept documents into ``root`` where that is not done yet, and open the cache."""
        config, folder = self.config, Bounded(root, root, self.config.limit)
        prepare(folder, overwrite=overwrite, resume=resume, dry=True)
        before = Record.read(root) if resume else None
        window = self._window(before)
        settings = {"tokens": config.tokens, "passes": window.passes, "shard_passes": window.shard_passes}
        if before is not None:
            _check_same(before.settings, settings, root)
        else:
            Disk(root, config.limit, window.bytes).clear()
            folder.remove(ROLLING)
        move = partial(report, "set aside")
        kept = self.model, {self.hook: folder}, self.source, config.kept()
        harvest_into(*kept, overwrite, resume, move, reader=self.reader)
        record = before or self._begun(root, settings)
        cache = RollingCache(root, config, window, record, window_bytes)
        save = partial(record.write, folder)
        save()
        cache.model = self.model
        cache._begin = lambda: (
            Harvester(self.reader, cache.manifest, window, config.tokens, cache.disk, record, save),
            Passes(self.packed, record.start, record.begin, self.source.name),
        )
        return cache

    def _window(self, before: Record | None) -> Window:
        words = len(vocabulary(self.model.tokenizer).to_json().encode())
        passes = sum(self.config.kept_passes())
        shards = math.ceil(passes / self.config.shard_passes(self.d_in))
        kept = self.config.bytes_of(passes, self.d_in, shards) + words + BLOCK
        found = None if before is None or self.config.window_tokens else before.settings.get("passes")
        return self.config.window(self.d_in, kept, found)

    def _begun(self, root: Path, settings: dict[str, Any]) -> Record:
        """The record of a stream that begins."""
        kept, (sample, held_out) = ActivationCache(root), self.config.kept_passes()
        wanted = (sample + held_out) * self.config.pass_size
        if kept.manifest.n_tokens < wanted:
            raise UserError(
                f"{self.source.name} ended after {kept.manifest.n_tokens:,} tokens, of which {wanted:,} are to be "
                "kept; give more text, or a smaller --sample-tokens and --held-out-tokens"
            )
        last = kept.manifest.n_documents - 1
        start, begin, shares = first_pass(self.packed(), sample + held_out, last, self.source.name)
        return Record(settings, start, shares, begin)


def _check_same(before: dict[str, Any], now: dict[str, Any], root: Path) -> None:
    """Refuse to continue a stream with other settings."""
    for name, value in now.items():
        if (was := before.get(name)) != value:
            raise UserError(
                f"{root} was begun with {name}={was}, not {value}; resume with the same settings, or start again with "
                "--overwrite"
            )
