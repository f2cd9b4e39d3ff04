"""Write the index of a run again with the strongest compression and in one piece: python checkpoints/pack.py RUN

The files become a fifth smaller. An index over many examples should stay as ``saelab index`` writes it, because a page
of the app then reads a small part of it; the indexes in this folder are small.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq

from saelab.features.schema import META_KEY
from saelab.files import replace
from saelab.layout import INDEX


def pack(run: Path) -> None:
    """Rewrite the parquet files of ``run/features``; rows, columns and what is said about them stay."""
    for file in sorted((run / INDEX).glob("*.parquet")):
        about = pq.read_metadata(file).metadata[META_KEY]
        table = pq.read_table(file)

        def write(partial: Path, table=table, about=about) -> None:
            with pq.ParquetWriter(partial, table.schema, compression="zstd", compression_level=19) as writer:
                writer.write_table(table, row_group_size=len(table))
                writer.add_key_value_metadata({META_KEY: about})

        replace(file, write)


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
