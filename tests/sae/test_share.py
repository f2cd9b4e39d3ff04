"""Budgets that processes spend together are spent as one process spends them, also with ties and uneven parts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab import kernels
from saelab.kernels import SelectedPreActs
from saelab.sae.share import Share, largest, spend, spend_by_latent

N, D_IN, D_SAE = 24, 8, 12


class Meeting:
    """Threads that add up tensors, in place of processes."""

    def __init__(self, size: int) -> None:
        self.barrier, self.held, self.calls = threading.Barrier(size, timeout=60), [torch.zeros(0)] * size, 0

    def add(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add(tensor: Tensor) -> Tensor:
            self.held[rank] = tensor.clone()
            self.calls += rank == 0
            self.barrier.wait()
            total = sum(self.held[1:], self.held[0].clone())
            self.barrier.wait()
            return total

        return add


def together(size: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> tuple[list[Any], int]:
    """What each of ``size`` threads returns, and how often they met."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(lambda rank: work(rank, meeting.add(rank)), range(size)))
    return found, meeting.calls


def entries(selected: SelectedPreActs, row: int = 0, latent: int = 0) -> set[tuple[int, int, float]]:
    """Token, latent and value of what is active, counted from ``row`` and ``latent`` on."""
    rows = torch.arange(selected.row_ptr.numel() - 1).repeat_interleave(selected.row_ptr.diff())
    triples = zip((rows + row).tolist(), (selected.indices + latent).tolist(), selected.values.tolist())
    return {entry for entry in triples if entry[2] != 0}


@pytest.fixture(params=["random", "ties", "one part", "few"])
def operands(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Tokens and encoder; products of small whole numbers are exact, and many of them equal."""
    generator = torch.Generator().manual_seed(3)
    if request.param == "ties":
        small = [torch.randint(-1, 2, shape, generator=generator).float() for shape in ((N, D_IN), (D_IN, D_SAE))]
        return small[0], small[1]
    x, W = (torch.randn(shape, generator=generator) for shape in ((N, D_IN), (D_IN, D_SAE)))
    if request.param == "one part":
        x[N // 2 :] *= 1e-3  # the first half of the tokens takes all of the budget
    if request.param == "few":
        x, W = x.abs(), -W.abs()
        W[:, 3] *= -1  # a single latent is positive anywhere
    return x, W


@pytest.mark.parametrize(("parts", "dict_parts"), [(2, 1), (1, 2), (2, 2), (4, 3)])
@pytest.mark.parametrize("signed", [False, True])
def test_a_budget_of_the_batch(operands: tuple[Tensor, Tensor], parts: int, dict_parts: int, signed: bool) -> None:
    x, W = operands
    budget, n, d_sae = 60, N // parts, D_SAE // dict_parts
    expected = entries(kernels.select_batch(x, W, None, None, budget, signed))

    def work(rank: int, add: Callable[[Tensor], Tensor]) -> set[tuple[int, int, float]]:
        part, dict_part = divmod(rank, dict_parts)
        share = Share(parts, part, dict_parts, dict_part, sum_all=add)
        rows, columns = x[part * n : (part + 1) * n], W[:, dict_part * d_sae : (dict_part + 1) * d_sae].contiguous()
        found = spend(lambda m: kernels.select_batch(rows, columns, None, None, m, signed), n, d_sae, budget, share)
        return entries(found, part * n, dict_part * d_sae)

    found, _ = together(parts * dict_parts, work)
    assert sum(map(len, found)) == len(set().union(*found)) == len(expected)
    # A product of other shapes may be rounded another way.
    places = [{entry[:2] for entry in one} for one in (set().union(*found), expected)]
    assert places[0] == places[1]


@pytest.mark.parametrize("parts", [2, 4])
def test_budgets_of_latents(operands: tuple[Tensor, Tensor], parts: int) -> None:
    x, W = operands
    budgets, n = torch.arange(D_SAE) * 2, N // parts
    expected = entries(kernels.select_latent(x, W, None, None, budgets))

    def work(rank: int, add: Callable[[Tensor], Tensor]) -> set[tuple[int, int, float]]:
        rows = x[rank * n : (rank + 1) * n]
        share = Share(parts, rank, sum=add)
        found = spend_by_latent(lambda own: kernels.select_latent(rows, W, None, None, own), n, budgets, share)
        return entries(found, rank * n)

    found, _ = together(parts, work)
    assert {entry[:2] for entry in set().union(*found)} == {entry[:2] for entry in expected}


def test_few_exchanges_where_no_values_are_equal() -> None:
    """Three digits and one question; ties take the digits of their places more."""
    keys = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    keys[0, 0] = torch.nan
    found, calls = together(
        2, lambda rank, add: largest(keys[rank], torch.arange(50) + 50 * rank, 100, torch.tensor([30]), add).kept
    )
    least = keys.nan_to_num(0).flatten().topk(30).values[-1]
    assert torch.equal(torch.stack(found), keys >= least)
    assert calls == 3


def test_a_mean_over_parts_has_the_gradient_of_its_own_part() -> None:
    own = [torch.tensor(value, requires_grad=True) for value in (2.0, 4.0)]
    found, _ = together(2, lambda rank, add: Share(2, rank, sum=add).mean(own[rank]))
    assert [mean.item() for mean in found] == [3.0, 3.0]
    for mean, value in zip(found, own):
        (mean**2).backward()
        assert value.grad == 6.0  # half of it, which the trainer takes, is that of (mean of both) ** 2
