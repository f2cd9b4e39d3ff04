"""Processor seconds of a visit and of a click, on the index of an SAE with 64,512 latents."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from users import User, serve

from saelab import shipped
from saelab.sae import build
from saelab.sae.weights import load_metadata, save

TIMES = 4
FIRST, CLICK = 2.0, 0.4  # processor seconds


def tile(source: Path, target: Path, times: int) -> Path:
    """A run with ``times`` as many latents: the index of ``source`` repeated, and random weights of that width."""
    meta = load_metadata(source)
    config = json.loads((source / "cfg.json").read_text())
    d_in, d_sae = config["d_in"], config["d_sae"]
    torch.manual_seed(1)
    save(build("topk", d_in, d_sae * times, k=32), target, {**meta, "train": {**meta["train"], "seed": 1}})
    (target / "features").mkdir()
    for name in ("features", "examples"):
        file = pq.ParquetFile(source / "features" / f"{name}.parquet")
        about = {key: value for key, value in file.metadata.metadata.items() if key != b"ARROW:schema"}
        index = json.loads(about[b"saelab.features"])
        about[b"saelab.features"] = json.dumps({**index, "d_sae": d_sae * times}).encode()
        with pq.ParquetWriter(target / "features" / f"{name}.parquet", file.schema_arrow) as writer:
            for part in range(times):
                for group in range(file.num_row_groups):
                    writer.write_table(_moved(file.read_row_group(group), part * d_sae))
            writer.add_key_value_metadata(about)
    return target


def _moved(rows: pa.Table, by: int) -> pa.Table:
    at = rows.schema.get_field_index("latent")
    latents = pc.add(rows["latent"], pa.scalar(by, rows["latent"].type))
    return rows.set_column(at, rows.schema.field("latent"), latents)


class Visitor(User):
    """A user who also tells the processor seconds of the server."""

    def seconds(self, pid: int, page: str, query: str, **values: object) -> float:
        before = processor_seconds(pid)
        problems = self.draw(page, query, **values)
        assert not problems, problems
        return processor_seconds(pid) - before


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.minutes
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads processor seconds from /proc")
def test_visits_and_clicks_on_a_large_index_are_cheap(tmp_path: Path) -> None:
    shutil.copytree(shipped.checkpoints() / "topk_16384", tmp_path / "small")
    tile(tmp_path / "small", tmp_path / "large", TIMES)
    found: dict[str, float] = {}
    with serve(tmp_path, "none") as (port, pid):
        user = Visitor(port, 0, ["large"], 65536, model=False)
        user.open()
        user.draw("", "run=small")  # imports
        for page in ("features", "latent", "health", "compare", "training", "prompt", "steering", ""):
            query = "run=large" + ("&latent=40000&pole=1" if page == "latent" else "")
            found[f"{page or 'overview'}, first"] = user.seconds(pid, page, query)
            found[f"{page or 'overview'}, again"] = min(user.seconds(pid, page, query) for _ in range(3))
        for i, word in enumerate(("war", "music", "river")):
            user.draw("features", "run=large")
            found[f"search {i}"] = user.seconds(pid, "features", "run=large", q=word)
        for i, latent in enumerate((123, 124, 50_000)):
            found[f"open {i}"] = user.seconds(pid, "latent", f"run=large&latent={latent}&pole=1")
        user.close()
    sys.stdout.write("".join(f"{name:24} {seconds:6.2f} processor seconds\n" for name, seconds in found.items()))
    slow = {n: s for n, s in found.items() if s > (FIRST if n.endswith("first") else 1.5 * CLICK)}
    assert not slow, slow
