"""Which backend runs, what it costs to import, and that threads, forks and recycled memory change no result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saelab import kernels
from saelab.data.cache import ActivationCache
from saelab.kernels import dispatch, memory, products
from saelab.kernels.cases import random_case
from saelab.kernels.dispatch import obstacle

needs_numba = pytest.mark.skipif(obstacle("numba") is not None, reason=str(obstacle("numba")))


def one_step(threads: int) -> list[torch.Tensor]:
    torch.set_num_threads(threads)
    try:
        case = random_case(300, 40, 700, 9)
        parameters = [t.clone().requires_grad_() for t in case[1:5]]
        W_enc, b_enc, b_dec, W_dec = parameters
        selected = kernels.select_topk(case.x, W_enc, b_enc, b_dec, 9)
        values = kernels.pre_acts_at(case.x, W_enc, b_enc, b_dec, selected)
        sse, recon = kernels.sse(case.x, values, *selected[1:], W_dec, b_dec)
        code = kernels.pursuit(case.x, W_dec, b_dec, 5)
        (sse.sum() + code.values.square().sum()).backward()
        return [*selected, recon, sse.detach(), *code[1:], *(p.grad for p in parameters if p.grad is not None)]
    finally:
        torch.set_num_threads(1)


@needs_numba
@pytest.mark.minutes  # test_screen.py asks it of one selection
def test_the_number_of_threads_does_not_change_a_selection_or_a_code() -> None:
    """Each row and each latent has one owner. The library's product may sum otherwise, hence a tolerance on values."""
    for one, two in zip(one_step(1), one_step(2)):
        if one.is_floating_point():
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(one, two)


@needs_numba
def test_two_runs_agree_to_the_bit() -> None:
    for first, second in zip(one_step(2), one_step(2)):
        assert torch.equal(first, second)


@needs_numba
def test_a_forked_child_stays_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP may not be entered after a fork, so a process that is not the importing one runs the kernel itself."""
    from saelab.kernels.numba import launch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    calls: list[tuple] = []
    kernel, driver = (lambda lo, hi: calls.append((lo, hi))), (lambda *_: calls.append(("driver",)))
    launch.launch(kernel, driver, 10)
    monkeypatch.setattr(launch.os, "getpid", lambda: -1)
    launch.launch(kernel, driver, 10)
    assert calls == [("driver",), (0, 10)]


def test_triton_and_numba_are_not_imported_before_they_are_needed() -> None:
    code = "import sys; import saelab.kernels; print('triton' in sys.modules, 'numba' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "SAELAB_KERNELS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_missing_package_is_named_and_the_reference_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAELAB_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_missing", lambda name: None if name == "reference" else f"{name} is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.backend() == "reference"
    assert "numba is not used: numba is not installed" in kernels.describe()
    assert kernels.select_topk(*random_case(2, 4, 8, 2).encoder, k=2).values.numel() == 4
    monkeypatch.setenv("SAELAB_KERNELS", "numba")
    with pytest.raises(ValueError, match="'numba' was asked for but numba is not installed"):
        kernels.select_topk(*random_case(2, 4, 8, 2).encoder, k=2)


def test_a_package_that_cannot_be_imported_is_passed_over_and_said(tmp_path: Path) -> None:
    """Numba refuses a NumPy that is newer than it: found, but of no use."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(
        "raise ImportError('Numba needs NumPy 2.4 or less. Got NumPy 2.5.')"
    )
    code = """
import torch
torch.cuda.is_available = lambda: False
from saelab import kernels
x, W = torch.randn(8, 4), torch.randn(4, 32)
assert kernels.select_topk(x, W, None, None, 2).values.numel() == 16
assert kernels.gather_rows(x, torch.tensor([1, 0]), torch.empty(2, 4))
print(kernels.describe())
from saelab.cli import main
main(["info", "--json"])
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "SAELAB_KERNELS"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": path},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    why = "numba cannot be imported (ImportError: Numba needs NumPy 2.4 or less. Got NumPy 2.5.)"
    said, _, facts = ran.stdout.partition("\n")
    assert said.startswith("reference") and f"numba is not used: {why}" in said
    assert json.loads(facts)["numba not used"] == why


def test_a_backend_for_gpus_leaves_the_reading_of_caches_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU machine the batches are gathered on the CPU, whatever computes them."""
    cache = ActivationCache.from_tensors(tmp_path / "cache", torch.randn(3000, 6), dtype="float16")
    expected = [batch.acts for batch in cache.batches(100)]
    monkeypatch.setenv("SAELAB_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for batch, acts in zip(cache.batches(100), expected, strict=True):
        assert torch.equal(batch.acts, acts)
    with pytest.raises(ValueError, match="'triton' was asked for but it works on CUDA or ROCm tensors"):
        kernels.select_topk(*random_case(2, 4, 8, 2).encoder, k=2)
    monkeypatch.setenv("SAELAB_KERNELS", "abacus")
    with pytest.raises(ValueError, match="there is none of that name"):
        next(cache.batches(100))


@needs_numba
def test_the_variable_and_the_context_name_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "reference")
    assert kernels.backend() == "reference"
    with kernels.use_backend("numba"):
        assert kernels.backend() == "numba" and kernels.describe().startswith("numba ")
        with pytest.raises(ValueError, match=r"computes in float32, not in torch\.float64"):
            kernels.select_topk(*random_case(2, 4, 8, 2).to(torch.float64).encoder, k=2)
    assert kernels.backend() == "reference"


@needs_numba
def test_kernels_run_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from saelab.kernels.numba import launch

    real = launch.numba.njit

    def njit(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'double': no locator available for file 'x.py'")
        return real(*args, **options)

    monkeypatch.setattr(launch.numba, "njit", njit)
    double = launch.compiled()(lambda x: 2 * x)
    assert double(3) == 6


def test_memory_is_recycled_only_when_nobody_refers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RECYCLED", 1)
    memory.release()
    first = memory.recycled(6, 7)
    address = first.data_ptr()
    view = first[2:]
    del first
    second = memory.recycled(6, 7)
    assert second.data_ptr() != address, "a view still reads that memory"
    del view
    assert memory.recycled(6, 7).data_ptr() == address
    second.fill_(1)
    assert not np.isnan(second.numpy()).any()


def test_a_buffer_is_lent_to_one_caller_at_a_time() -> None:
    like = torch.zeros(1)
    with memory.scratch(1000, like) as a, memory.scratch(1000, like) as b:
        assert a.data_ptr() != b.data_ptr()


def test_blocks_cover_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ROWS", 5)
    monkeypatch.setattr(products, "CHUNK_BYTES", 5 * 64 * 4)
    x, W = torch.randn(13, 6), torch.randn(6, 200)
    found, seen = torch.full((13, 200), float("nan")), 0
    for row, column, block in products.blocks(x, W):
        found[row : row + block.shape[0], column : column + block.shape[1]] = block
        seen += 1
    assert seen > 4
    torch.testing.assert_close(found, x @ W)


@needs_numba
@pytest.mark.parametrize("signed", [False, True])
def test_selection_over_many_blocks_is_that_of_one(monkeypatch: pytest.MonkeyPatch, signed: bool) -> None:
    """Small integers: exact products, and ties across the borders of blocks."""
    x, W = torch.randint(-2, 3, (13, 6)).float(), torch.randint(-1, 2, (6, 300)).float()
    with kernels.use_backend("numba"):
        whole = kernels.select_topk(x, W, None, None, 7, signed), kernels.select_batch(x, W, None, None, 90, signed)
        monkeypatch.setattr(products, "ROWS", 5)
        monkeypatch.setattr(products, "CHUNK_BYTES", 5 * 64 * 4)
        parts = kernels.select_topk(x, W, None, None, 7, signed), kernels.select_batch(x, W, None, None, 90, signed)
    for one, many in zip(whole, parts):
        dense = [torch.zeros(13, 300).index_put((rows(c.row_ptr), c.indices), c.values + 10) for c in (one, many)]
        assert torch.equal(*dense)


def rows(row_ptr: torch.Tensor) -> torch.Tensor:
    return torch.repeat_interleave(row_ptr.diff())


@needs_numba
def test_a_changed_dictionary_is_never_pursued_with_an_old_gram_matrix() -> None:
    """Changed behind autograd's back, so that no version counter could tell."""
    case = random_case(40, 8, 30, 1)
    W = case.W_dec.clone()
    with kernels.use_backend("numba"):
        kernels.pursuit(case.x, W, None, 4)
        W.data.copy_(random_case(40, 8, 30, 1, seed=9).W_dec)
        found = kernels.pursuit(case.x, W, None, 4)
    with kernels.use_backend("reference"):
        expected = kernels.pursuit(case.x, W, None, 4)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-5)


@needs_numba
def test_release_also_gives_back_the_gram_matrix() -> None:
    from saelab.kernels.numba import pursuit

    case = random_case(40, 8, 30, 1)
    with kernels.use_backend("numba"):
        kernels.pursuit(case.x, case.W_dec, None, 4)
        assert pursuit._kept
        memory.release()
        assert not pursuit._kept


@needs_numba
def test_the_description_says_what_runs_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_device", lambda: "cpu")
    monkeypatch.delenv("SAELAB_KERNELS", raising=False)
    said = kernels.describe(torch.bfloat16)
    assert said.startswith("reference") and "numba is not used: it computes in float32, not in torch.bfloat16" in said
    with kernels.use_backend("numba"):
        assert kernels.describe(torch.bfloat16).startswith("none (numba is asked for, but it computes in float32")


@needs_numba
def test_importing_and_running_the_kernels_leaves_numbas_settings_alone() -> None:
    """Numba chooses one threading layer for the process; only our own launch asks for OpenMP."""
    code = """
import torch
from numba import threading_layer
from numba.core import config
before = list(config.THREADING_LAYER_PRIORITY)
from saelab import kernels
x, W = torch.randn(64, 8), torch.randn(8, 256)
with kernels.use_backend("numba"):
    kernels.select_topk(x, W, None, None, 4)
assert list(config.THREADING_LAYER_PRIORITY) == before, config.THREADING_LAYER_PRIORITY
assert torch.get_num_threads() == 1 or threading_layer() == "omp", threading_layer()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr


@needs_numba
def test_compiling_is_announced_once_and_can_be_done_beforehand(tmp_path: Path) -> None:
    """In an empty cache of kernels; the command ``info --warm`` leaves nothing to compile for later ones."""
    code = """
import sys
import torch
from saelab.kernels import compiling, ops
compiling.tell_before(lambda: print("compiling"))
if sys.argv[1] == "warm":
    assert compiling.warm_up()
x, W = torch.randn(4, 8), torch.randn(8, 64)
ops.gather_rows(x, torch.tensor([1, 0]), torch.empty(2, 8))
ops.decode(torch.randn(4), torch.arange(4), torch.arange(5), W.T.contiguous(), None)
if sys.argv[1:] != ["few"]:
    ops.select_topk(x, W, None, None, 4)
    ops.select_batch(x, W, None, None, 4)
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(how: str) -> list[str]:
        command = [sys.executable, "-c", code, how]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return ran.stdout.split()

    if os.environ.get("SAELAB_SLOW"):
        assert run("warm") == ["compiling"]
        assert run("cold") == []
    else:  # compiling all takes most of a minute, the selection of a batch ten seconds
        assert run("few") == ["compiling"]
        assert run("few") == []
