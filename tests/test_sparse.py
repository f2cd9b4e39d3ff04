"""SparseCode against the dense matrix it stands for."""

from __future__ import annotations

import pytest
import torch

from saelab.sparse import SparseCode


def ragged() -> tuple[SparseCode, torch.Tensor]:
    """Three tokens with 2, 0 and 3 entries, one of them a stored zero, one negative."""
    code = SparseCode(
        values=torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]),
        indices=torch.tensor([4, 1, 0, 2, 4]),
        row_ptr=torch.tensor([0, 2, 2, 5]),
        d_sae=5,
    )
    dense = torch.tensor([[0, -2.0, 0, 0, 1], [0, 0, 0, 0, 0], [0.5, 0, 0, 0, 3]])
    return code, dense


def test_dense_and_counts_by_hand() -> None:
    code, dense = ragged()
    assert torch.equal(code.dense(), dense)
    assert code.n == 3
    assert code.counts().tolist() == [2, 0, 3]
    assert code.rows().tolist() == [0, 0, 2, 2, 2]
    # The stored zero does not fire, the negative value does.
    assert code.l0().tolist() == [2, 0, 2]
    assert code.firing_counts().tolist() == [1, 1, 0, 0, 2]
    assert code.fired().tolist() == [True, True, False, False, True]


def test_from_rows_is_a_view() -> None:
    values, indices = torch.randn(3, 2), torch.tensor([[0, 4], [1, 2], [3, 0]])
    code = SparseCode.from_rows(values, indices, 5)
    assert code.row_ptr.tolist() == [0, 2, 4, 6]
    assert code.values.data_ptr() == values.data_ptr()


@pytest.mark.parametrize("n", [0, 1, 7])
def test_from_dense_round_trip(n: int) -> None:
    dense = torch.randn(n, 6) * (torch.rand(n, 6) < 0.4)
    assert torch.equal(SparseCode.from_dense(dense).dense(), dense)


def test_nonzero_drops_stored_zeros_only() -> None:
    code, dense = ragged()
    assert code.nonzero().counts().tolist() == [2, 0, 2]
    assert torch.equal(code.nonzero().dense(), dense)


def test_only_the_marked_entries() -> None:
    code, dense = ragged()
    found = code.only(code.indices == code.indices[0])
    assert torch.equal(found.dense(), torch.where(torch.arange(code.d_sae) == code.indices[0], dense, 0.0))


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 3), slice(2, 2), slice(-1, None), slice(None)])
def test_slicing_takes_tokens(rows: slice) -> None:
    code, dense = ragged()
    assert torch.equal(code[rows].dense(), dense[rows])


def test_strided_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="steps of 1"):
        ragged()[0][::2]


def test_dense_is_differentiable_in_the_values() -> None:
    code, _ = ragged()
    values = code.values.clone().requires_grad_()
    SparseCode(values, code.indices, code.row_ptr, code.d_sae).dense().sum().backward()
    assert torch.equal(values.grad, torch.ones(5))


def test_the_first_latents_of_a_code() -> None:
    dense = torch.tensor([[1.0, 0, 2, 3], [0, 0, 0, 4], [0, 5, 0, 0]])
    assert torch.equal(SparseCode.from_dense(dense).first(3).dense(), dense[:, :3])
