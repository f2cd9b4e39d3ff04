"""Read a feature index: one latent at a time without reading the rest, or all of them as a table."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from saelab.copies import fetched
from saelab.errors import UserError, damaged
from saelab.features.schema import META_KEY, VERSION, Example
from saelab.layout import EXAMPLES, FEATURES, INDEX


class _Unreadable(Exception):
    """The reader's report of damaged data."""


class FeatureIndex:
    """The index of a run folder, or of the local copy of one behind a URL.

    Opening reads two footers; latents are read when asked for, by several threads too. Raises UserError when there is
    no index, or one of another version.
    """

    def __init__(self, run_folder: Path | str) -> None:
        self.run_folder = fetched(run_folder) or Path(run_folder)
        self.folder = self.run_folder / INDEX
        # Arrow's reader is not made for several threads: it loses track of what it has read ahead.
        self._reading = threading.RLock()
        for name in (FEATURES, EXAMPLES):
            if not (self.folder / name).is_file():
                raise UserError(
                    f"{self.run_folder} has no feature index; make it with `saelab index {self.run_folder}`"
                )
        with self._sound():
            self._features = pq.ParquetFile(self.folder / FEATURES, memory_map=True)
            self._examples = pq.ParquetFile(self.folder / EXAMPLES, memory_map=True)
        meta = (self._features.metadata.metadata or {}).get(META_KEY)
        if meta is None:
            raise UserError(
                f"{self.folder / FEATURES} is not a feature index of saelab; run `saelab index` with --overwrite"
            )
        with self._sound():
            self.meta: dict[str, Any] = json.loads(meta)
        if self.meta.get("version") != VERSION:
            raise UserError(
                f"{self.folder} has index version {self.meta.get('version')}, this saelab reads {VERSION}; "
                "run `saelab index` with --overwrite"
            )
        with self._sound():
            self._open()

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        """Let one thread read at a time, and name the folder in the error if the data read in this block are damaged.

        An error that the system reports (a number of open files, a network share) is not damage and stays what it is.
        """
        with self._reading, damaged(self.folder, "run `saelab index` with --overwrite", _Unreadable):
            try:
                yield
            except pa.ArrowMemoryError as error:
                raise UserError(f"not enough memory to read {self.folder}; close other programs") from error
            except pa.ArrowException as error:
                raise _Unreadable(str(error)) from error
            except OSError as error:
                if error.errno is not None:
                    raise
                raise _Unreadable(str(error)) from error

    def _open(self) -> None:
        self._group_starts = _group_starts(self._features)
        latent = self._examples.schema_arrow.get_field_index("latent")
        bounds = [
            self._examples.metadata.row_group(group).column(latent).statistics
            for group in range(self._examples.num_row_groups)
        ]
        # A group without rows, of an index that keeps no examples, holds no latent.
        self._example_bounds = [(0, -1) if s is None or not s.has_min_max else (s.min, s.max) for s in bounds]
        # Walking through neighbouring latents reads each group once.
        self._feature_group = functools.lru_cache(maxsize=2)(self._features.read_row_group)
        self._example_group = functools.lru_cache(maxsize=2)(self._examples.read_row_group)

    @property
    def d_sae(self) -> int:
        """Latents of the indexed SAE."""
        return self.meta["d_sae"]

    @property
    def poles(self) -> tuple[int, ...]:
        """(1,), or (1, -1) for an SAE with negative activations."""
        return tuple(self.meta["poles"])

    @property
    def histogram_edges(self) -> list[float]:
        """Magnitudes that delimit the bins of the ``histogram`` column."""
        return self.meta["histogram_edges"]

    @functools.cached_property
    def _table(self) -> pd.DataFrame:
        schema = self._features.schema_arrow
        plain = [field.name for field in schema if not pa.types.is_list(field.type)]
        with self._sound():
            return self._features.read(columns=plain).to_pandas()

    def table(self) -> pd.DataFrame:
        """One row per (latent, pole) with every column that is a single value. The caller owns the copy."""
        return self._table.copy()

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns for all (latent, pole), in the order of :meth:`table`; lists of tokens too."""
        with self._sound():
            return self._features.read(columns=list(names))

    def latent(self, latent: int, pole: int = 1) -> dict[str, Any]:
        """Everything known about one (latent, pole): the columns of ``features.parquet``."""
        number = self._row(latent, pole)
        group = int(np.searchsorted(self._group_starts, number, side="right")) - 1
        with self._sound():
            rows = self._feature_group(group)
        return rows.slice(number - self._group_starts[group], 1).to_pylist()[0]

    def examples(self, latent: int, pole: int = 1, kind: str | None = None) -> list[Example]:
        """The windows kept for one (latent, pole), ordered by kind and rank; of one ``kind`` only where given."""
        self._row(latent, pole)
        found = []
        for group, (low, high) in enumerate(self._example_bounds):
            if low <= latent <= high:
                with self._sound():
                    rows = self._example_group(group)
                latents, poles = rows["latent"].to_numpy(), rows["pole"].to_numpy()
                hits = np.flatnonzero((latents == latent) & (poles == pole))
                found += rows.take(pa.array(hits)).to_pylist()
        return [Example.from_row(row) for row in found if kind is None or row["kind"] == kind]

    @functools.cached_property
    def roles(self) -> pd.DataFrame:
        """``latent``, ``pole`` and the ``role`` that most of its top examples fire on; empty for a text without chats.

        Of roles with equally many it is the first in the alphabet.
        """
        names = ["latent", "pole", "kind", "role"]
        if "role" not in self._examples.schema_arrow.names:  # an index of 0.1.0
            return pd.DataFrame({name: [] for name in ("latent", "pole", "role")})
        with self._sound():
            rows: Any = self._examples.read(columns=names).to_pandas()
        counts = rows[rows["kind"] == "top"].groupby(["latent", "pole", "role"]).size().rename("n").reset_index()
        if not (counts["role"] != "text").any():
            return counts.iloc[:0][["latent", "pole", "role"]]
        counts = counts.sort_values(["n", "role"], ascending=[False, True])
        return counts.drop_duplicates(["latent", "pole"])[["latent", "pole", "role"]]

    def max_activation(self, latent: int, pole: int = 1) -> float:
        """Largest magnitude in the corpus, raw units; 0 where it never fired."""
        return float(self._table["max"].iloc[self._row(latent, pole)])

    def _row(self, latent: int, pole: int) -> int:
        if not 0 <= latent < self.d_sae:
            raise UserError(f"latent {latent} is outside 0..{self.d_sae - 1}")
        if pole not in self.poles:
            known = ", ".join(f"{p:+d}" for p in self.poles)
            raise UserError(f"pole {pole:+d} is not in this index (poles: {known})")
        return latent * len(self.poles) + self.poles.index(pole)


def _group_starts(file: pq.ParquetFile) -> np.ndarray:
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return np.concatenate([[0], np.cumsum(sizes)])
