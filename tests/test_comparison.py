"""Matching two SAEs against the dense assignment problem and planted relations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from saelab import SAE, ActivationCache, SparseCode, UserError, build
from saelab.comparison import match_saes


class Given(SAE):
    """Planted decoder rows and codes: the first coordinate of ``x`` is the row."""

    variant = "given"

    def __init__(self, W_dec: torch.Tensor, code: torch.Tensor | None = None, signed: bool = False) -> None:
        super().__init__(W_dec.shape[1], W_dec.shape[0])
        self.W_dec.data.copy_(W_dec)
        self.code, self.signed = code, signed

    def encode(self, x: torch.Tensor, grads: torch.Tensor | None = None) -> SparseCode:
        assert self.code is not None
        return SparseCode.from_dense(self.code[x[:, 0].long()])


def rows_of(folder: Path, n: int, d_in: int) -> ActivationCache:
    acts = torch.zeros(n, d_in)
    acts[:, 0] = torch.arange(n)
    return ActivationCache.from_tensors(folder / "cache", acts)


@pytest.mark.parametrize("signed", [False, True])
def test_pairs_are_the_optimal_assignment(signed: bool) -> None:
    a = torch.nn.functional.normalize(torch.randn(30, 5), dim=1)
    b = torch.nn.functional.normalize(a[torch.randperm(30)[:24]] + 0.4 * torch.randn(24, 5), dim=1)
    found = match_saes(Given(a, signed=signed), Given(b, signed=signed), shared=0.6)
    similarity = (a @ b.T).double().numpy()
    similarity = np.abs(similarity) if signed else similarity
    # A pair below the threshold is worth nothing, as is staying alone.
    worth = np.where(similarity >= 0.6, similarity, 0.0)
    best = worth[linear_sum_assignment(worth, maximize=True)].sum()
    assert found.pairs["similarity"].sum() == pytest.approx(best, rel=1e-6)
    assert found.pairs["left"].is_unique and found.pairs["right"].is_unique
    assert (found.left["status"] == "shared").sum() == (found.right["status"] == "shared").sum() == len(found.pairs)
    closest = np.abs(similarity).argmax(1) if signed else similarity.argmax(1)
    near = similarity.max(1) >= 0.3
    assert found.left["best"].to_numpy()[near].tolist() == closest[near].tolist()


def test_a_shuffled_copy_is_shared_throughout() -> None:
    sae = build("topk", 16, 64, k=4).eval()
    order = torch.randperm(64)
    other = Given(sae.W_dec.detach()[order])
    found = match_saes(sae, other)
    assert order[found.left["partner"].tolist()].tolist() == list(range(64))
    assert found.counts() == {"left": {"shared": 64}, "right": {"shared": 64}}


def test_split_absorbed_lone_and_dead_latents(tmp_path: Path) -> None:
    n = 1200
    unit = torch.eye(8)
    mixed = torch.nn.functional.normalize(unit[0] + unit[1], dim=0)
    tilted = torch.nn.functional.normalize(unit[2] + unit[3], dim=0)
    # Left 0 is the union of right 0 and 1, 1 is right 2, 2 fires inside right 2's firings, 3 is alone, 4 is dead.
    left_dec = torch.stack([mixed, unit[2], tilted, unit[5], unit[6]])
    right_dec = torch.stack([unit[0], unit[1], unit[2], unit[7]])
    left, right = torch.zeros(n, 5), torch.zeros(n, 4)
    right[:100, 0], right[100:200, 1], right[300:500, 2] = 1.0, 1.0, 1.0
    left[:200, 0], left[300:500, 1], left[320:360, 2], left[700:720, 3] = 1.0, 1.0, 1.0, 1.0
    right[800:810, 3] = 1.0
    cache = rows_of(tmp_path, n, 8)
    found = match_saes(Given(left_dec, left), Given(right_dec, right), cache, shared=0.9)
    assert found.tokens == n
    assert found.left["status"].tolist() == ["split", "shared", "absorbed", "only-left", "dead"]
    assert sorted(found.left["related"][0]) == [0, 1]
    assert found.left["related"][2] == [2]
    assert found.right["status"].tolist() == ["absorbed", "absorbed", "shared", "only-right"]
    pair = found.pairs.iloc[0]
    expected = np.corrcoef(left[:, 1], right[:, 2])[0, 1]
    assert (pair["left"], pair["right"]) == (1, 2)
    assert pair["correlation"] == pytest.approx(expected)
    assert pair["similarity"] == pytest.approx((1 + expected) / 2)


def test_a_mirror_image_is_the_same_axis_of_a_signed_sae(tmp_path: Path) -> None:
    W = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    code = torch.randn(50, 6)
    found = match_saes(Given(W, code, True), Given(-W, -code, True), rows_of(tmp_path, 50, 8))
    assert (found.left["status"] == "shared").all()
    assert found.pairs["cosine"].to_numpy() == pytest.approx(-1)
    assert found.pairs["similarity"].to_numpy() == pytest.approx(1)


def test_saes_of_different_widths_of_input_are_refused() -> None:
    with pytest.raises(UserError, match="d_in=4 and d_in=5"):
        match_saes(build("topk", 4, 8, k=2), build("topk", 5, 8, k=2))
