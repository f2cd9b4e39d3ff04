"""A small rolling cache for tests, and the rows that its stream must give, computed from a whole cache by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saelab.data.cache import ActivationCache, Batch
from saelab.data.cache.storage import Folder
from saelab.data.text import TextSource, from_documents
from saelab.harvesting import HarvestConfig, harvest
from saelab.harvesting.rolling import RollingCache, RollingConfig, roll
from saelab.lm import load_model
from tests import tiny_lm

HOOK = "blocks.1.hook_resid_post"
CONTEXT, PASS = 16, 4  # tokens of a context, contexts of a pass
WIDTH = 64
TEXT = from_documents([tiny_lm.sentences(60, seed) for seed in range(120)])
BOTH: dict[str, Any] = {"context_length": CONTEXT, "pass_tokens": PASS * CONTEXT, "dtype": "float32"}
SMALL: dict[str, Any] = {**BOTH, "shard_bytes": 4 * PASS * CONTEXT * WIDTH * 4, "window_tokens": 10 * PASS * CONTEXT}
SETTINGS: dict[str, Any] = {**SMALL, "tokens": 4000, "cache_gb": 0.00075, "sample_tokens": 200, "held_out_tokens": 200}


def llama(folder: Path, seed: int = 0) -> Any:
    """A model whose activations take more of the disk than the files' headers do."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2}
    return load_model(tiny_lm.save_llama(folder, seed, **sizes), device="cpu")


def kill_at(monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """End the process, as far as a test can, in place of the cache's n-th file."""
    original, count = Folder.write, itertools.count()

    def killed(self: Folder, name: str, data: bytes) -> None:
        if next(count) == write:
            raise KeyboardInterrupt
        original(self, name, data)

    monkeypatch.setattr(Folder, "write", killed)


def rolling(model: Any, folder: Path, text: TextSource = TEXT, hook: str = HOOK, **options: Any) -> RollingCache:
    names = {field.name for field in dataclasses.fields(RollingConfig)}
    config = RollingConfig(**{**SETTINGS, **{name: value for name, value in options.items() if name in names}})
    return roll(model, hook, text, folder, config, **{n: v for n, v in options.items() if n not in names})


def whole(model: Any, folder: Path, text: TextSource = TEXT, hook: str = HOOK, **options: Any) -> ActivationCache:
    """Everything in the text, by an ordinary harvest."""
    return harvest(model, hook, text, folder, HarvestConfig(tokens=10**6, held_out=0, **{**BOTH, **options}))


def expected_rows(full: ActivationCache, start: int, passes: Sequence[int], seed: int) -> list[np.ndarray]:
    """For each segment, the rows of the whole cache in the order of the stream, as its documentation has it.

    The segments' passes follow each other from pass ``start`` to the end of the text, and from there again. A segment
    that fits a window is one permutation.
    """
    contexts = [rows[rows >= 0].numpy() for _, rows in full.contexts("all")]
    groups = [np.concatenate(contexts[at : at + PASS]) for at in range(start * PASS, len(contexts), PASS)]
    stream, found = itertools.cycle(groups), []
    for number, count in enumerate(passes):
        rows = np.concatenate(list(itertools.islice(stream, count)))
        found.append(rows[np.random.default_rng([seed, number, 0]).permutation(len(rows))])
    return found


class FullRun(ActivationCache):
    """The whole cache, read in the order of a stream, with the statistics and the sample that the stream states."""

    def __init__(self, full: ActivationCache, kept: ActivationCache, record: Any, tokens: int) -> None:
        super().__init__(full.path)
        sample = kept.split_rows("train")
        acts = full.read(range(*sample)).acts.double()
        mean, squares = acts.mean(0), float(acts.square().sum(1).mean())
        assert np.allclose(kept.manifest.mean, mean, rtol=0, atol=1e-12 * squares**0.5)
        assert np.isclose(kept.manifest.variance, squares - float(mean.square().sum()), rtol=1e-12)
        names = ("mean", "rms_norm", "mean_norm", "variance", "scale")
        self.manifest = dataclasses.replace(self.manifest, **{name: getattr(kept.manifest, name) for name in names})
        self._sample, self._tokens, self._record = sample, tokens, record

    @property
    def sample_rows(self) -> tuple[int, int]:
        return self._sample

    def n_split(self, split: Any) -> int:
        return self._tokens if split == "train" else super().n_split(split)

    def batches(self, batch_size: int, *, seed: int | None = 0, start: int = 0, grads: bool = False, **_: Any) -> Any:  # pyright: ignore
        passes = [segment.passes for segment in self._record.segments]
        order = np.concatenate(expected_rows(self, self._record.start, passes, seed or 0))
        return self._given(torch.from_numpy(order), batch_size, start, grads)

    def _given(self, order: torch.Tensor, size: int, start: int, grads: bool) -> Generator[Batch]:
        for at in range(start * size, self._tokens // size * size, size):
            yield self.read(order[at : at + size], grads=grads)
