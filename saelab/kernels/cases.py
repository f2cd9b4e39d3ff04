"""Input cases shared by the parity tests and the benchmark: ordinary ones, and edge cases that break kernels.

Each case is small, because it also runs under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """The arguments of an encoder and a decoder, and a budget per token."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor | None
    b_dec: Tensor | None
    W_dec: Tensor
    k: int

    @property
    def encoder(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.x, self.W_enc, self.b_enc, self.b_dec

    def to(self, *args: object) -> Case:
        """Cast or move every tensor; layouts are kept."""
        return Case(*(t.to(*args) if isinstance(t, Tensor) else t for t in self))  # pyright: ignore


def random_case(n: int, d_in: int, d_sae: int, k: int, seed: int = 0) -> Case:
    """Gaussian data and unit-norm directions, the encoder tied to the decoder and column-major."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = torch.nn.functional.normalize(normal(d_sae, d_in), dim=1)
    W_enc = (W_dec + 0.05 * normal(d_sae, d_in)).T
    return Case(normal(n, d_in), W_enc, 0.1 * normal(d_sae), 0.1 * normal(d_in), W_dec, k)


def _few_positive() -> Case:
    """Fewer than k positive pre-activations per row: the surplus is clipped and must carry no gradient."""
    case = random_case(5, 8, 40, 16)
    return case._replace(b_enc=torch.full((40,), -1.2))


def _integers(n: int = 6, d_in: int = 8, d_sae: int = 64, k: int = 7) -> Case:
    """Small integers: many pre-activations are equal, exactly."""
    case = random_case(n, d_in, d_sae, k)
    return Case(case.x.round(), case.W_enc.mul(2).round(), torch.zeros(d_sae), torch.zeros(d_in), case.W_dec, k)


def _all_equal() -> Case:
    case = random_case(3, 6, 50, 5)
    return case._replace(W_enc=torch.zeros(50, 6).T, b_enc=torch.full((50,), 0.5))


def _minus_infinity() -> Case:
    """Some latents are switched off by a bias of -inf, all but three of them."""
    case = random_case(4, 8, 24, 5)
    b_enc = torch.full((24,), float("-inf"))
    b_enc[[3, 11, 23]] = 0.0
    return case._replace(b_enc=b_enc)


def _popular() -> Case:
    """One latent wins on every token."""
    case = random_case(20, 8, 48, 3)
    b_enc = torch.zeros(48)
    b_enc[17] = 50.0
    return case._replace(b_enc=b_enc)


def _no_bias() -> Case:
    return random_case(4, 8, 32, 4)._replace(b_enc=None, b_dec=None)


def _row_major() -> Case:
    case = random_case(4, 8, 32, 4)
    return case._replace(W_enc=case.W_enc.contiguous())


def _strided() -> Case:
    """A view of a wider batch: the stride of a row is not d_in, and every second column is skipped."""
    case = random_case(4, 8, 32, 4)
    return case._replace(x=torch.randn(4, 16, generator=torch.Generator().manual_seed(1))[:, ::2])


CASES: dict[str, Callable[[], Case]] = {
    "ordinary": lambda: random_case(9, 12, 96, 8),
    "one-row": lambda: random_case(1, 8, 64, 4),
    "k-1": lambda: random_case(5, 8, 64, 1),
    "k-is-d_sae": lambda: random_case(4, 8, 20, 20),
    "k-not-a-power-of-two": lambda: random_case(5, 8, 100, 6),
    "width-not-a-multiple": lambda: random_case(3, 7, 131, 5),
    "one-latent": lambda: random_case(3, 5, 1, 1),
    "one-dimension": lambda: random_case(4, 1, 33, 2),
    "few-positive": _few_positive,
    "ties": _integers,
    "all-equal": _all_equal,
    "minus-infinity": _minus_infinity,
    "popular": _popular,
    "no-bias": _no_bias,
    "row-major": _row_major,
    "strided": _strided,
}
