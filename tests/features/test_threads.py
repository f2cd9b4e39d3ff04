"""One index, read by many threads, as the sessions of the app do: every answer is that of a single reader."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from saelab.errors import UserError
from saelab.features import FeatureIndex, build_index
from saelab.features.indexing.config import IndexConfig
from tests.features.lookup import Lookup

LATENTS = 600


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from saelab.data.cache import ActivationCache

    folder = tmp_path_factory.mktemp("threads")
    torch.manual_seed(0)
    acts = torch.randn(4000, 4)
    acts[:, 0] = torch.arange(4000)
    words = [f" w{i}" for i in range(50)]
    tokens = torch.randint(0, 50, (4000,))
    cache = ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=20, vocabulary=words)
    code = torch.rand(4000, LATENTS) * (torch.rand(4000, LATENTS) < 0.01)
    build_index(Lookup(code), cache, folder / "run", config=IndexConfig())
    return folder / "run"


def test_many_threads_read_what_one_reads(run: Path) -> None:
    alone = FeatureIndex(run)
    assert alone._examples.num_row_groups > 4  # so that threads read different groups
    expected = {latent: (alone.latent(latent), alone.examples(latent)) for latent in range(0, LATENTS, 60)}
    tokens = alone.columns(["top_tokens"])

    def read(number: int) -> None:
        latent = 60 * (number * 7 % (LATENTS // 60))
        assert str(shared.latent(latent)) == str(expected[latent][0])
        assert shared.examples(latent) == expected[latent][1]
        if number % 5 == 0:
            assert shared.columns(["top_tokens"]).equals(tokens)
            assert len(shared.table()) == LATENTS

    for _ in range(4):
        shared = FeatureIndex(run)
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(read, range(120)))


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError("Couldn't deserialize thrift"), UserError, "is damaged"),
        (pa.ArrowInvalid("Unexpected end of stream"), UserError, "is damaged"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), OSError, "Too many open files"),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), OSError, "Stale file handle"),
        (pa.ArrowMemoryError("malloc of size 9 failed"), UserError, "not enough memory"),
    ],
)
def test_a_passing_fault_is_not_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], message: str
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    index = FeatureIndex(run)
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "read", fail)
        with pytest.raises(expected, match=message):
            index.columns(["top_tokens"])
    assert len(index.columns(["top_tokens"])) == LATENTS


HAMMER = """
import sys, threading
import torch
import saelab
from saelab.kernels.dispatch import describe
torch.set_num_threads(2)
if sys.argv[1] == "workqueue":
    assert "numba" in describe(), describe()
sae = saelab.build("topk", d_in=64, d_sae=512, k=8).eval()
x = torch.randn(3000, 64)
expected = sae.encode(x)
def read():
    for _ in range(6):
        code = sae.encode(x)
        assert torch.equal(code.indices, expected.indices) and torch.equal(code.values, expected.values)
        seen.append(sae.decode(code))
seen = []
threads = [threading.Thread(target=read) for _ in range(6)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(seen) == 36
if sys.argv[1] == "workqueue":
    import numba
    assert numba.threading_layer() == "workqueue"
print("done")
"""


@pytest.mark.parametrize("layer", ["workqueue", "none"])
def test_kernels_without_openmp_and_without_numba(layer: str) -> None:
    """macOS has no OpenMP for numba: its own work queue ends the process if two threads enter it."""
    hidden = "import sys; sys.modules.update(triton=None%s)\n" % (", numba=None" if layer == "none" else "")
    environment = os.environ | {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    environment |= {"NUMBA_THREADING_LAYER": layer} if layer == "workqueue" else {}
    done = subprocess.run(
        [sys.executable, "-c", hidden + HAMMER, layer], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]
