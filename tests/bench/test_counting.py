"""A training step on a GPU: fewer than 40 kernels, no synchronisation, at most 36 bytes for each parameter."""

from __future__ import annotations

import pytest
import torch

from saelab.kernels.dispatch import obstacle

if obstacle("triton", "cpu") is not None:
    pytest.skip(f"triton: {obstacle('triton', 'cpu')}", allow_module_level=True)

from saelab.bench import counting
from saelab.bench.counting import Counting, counted
from tests.kernels.conftest import quicken_interpreter

quicken_interpreter()


@pytest.fixture(autouse=True)
def _fewer_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the latents take the interpreter half the time; what is counted does not depend on how many there are."""
    monkeypatch.setattr(counting, "D_SAE", 128)


def test_the_counter_sees_what_makes_the_host_wait() -> None:
    x = torch.arange(8.0)
    with Counting(8) as counting:
        (x * 2).sum().item()
        x.nonzero()
        torch.bincount(x.long())
        x[x > 3]
    assert counting.count.waits == {"_local_scalar_dense": 1, "nonzero": 1, "bincount": 1, "index": 1}
    assert counting.count.kernels["mul"] == 1 and counting.count.bytes["mul"] == 2 * 8 * 4


def test_a_step_of_topk() -> None:
    count = counted("topk")
    assert count.launches() < 40, count.kernels
    assert not count.waits
    assert count.per_parameter <= 36, count.bytes


@pytest.mark.parametrize(
    ("variant", "dead"),
    [("topk", 50), ("batch_topk", 0)]
    + [pytest.param(variant, 50, marks=pytest.mark.minutes) for variant in ("mutual_choice", "feature_choice")],
)
def test_dead_latents_and_a_batch_budget_make_nothing_wait(variant: str, dead: int) -> None:
    count = counted(variant, dead)
    assert not count.waits and count.per_parameter <= 36, count


@pytest.mark.parametrize("options", [{}, {"random_prefixes": 4}], ids=["groups", "random prefixes"])
def test_nested_dictionaries_take_one_pass_and_make_nothing_wait(options: dict[str, int]) -> None:
    count = counted("matryoshka", **options)
    assert not count.waits and count.per_parameter <= 36, count


@pytest.mark.parametrize("variant", [pytest.param("jump_relu", marks=pytest.mark.minutes), "gated"])  # alike
def test_a_threshold_waits_once_and_an_activation_adds_no_pass(variant: str) -> None:
    count = counted(variant)
    assert count.waits == {"_local_scalar_dense": 1}
    assert count.per_parameter <= 36, count.bytes
