"""Bad input is refused before any launch, in a sentence that names the value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from saelab import kernels
from saelab.kernels.cases import random_case

case = random_case(4, 6, 20, 3)
code = (torch.ones(2), torch.tensor([1, 4]), torch.tensor([0, 1, 2]))

REFUSALS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "integers": (lambda: kernels.select_topk(case.x.long(), *case.encoder[1:], k=3), TypeError, "x is torch.int64"),
    "complex": (lambda: kernels.select_topk(case.x.cfloat(), *case.encoder[1:], k=3), TypeError, "complex64"),
    "mixed": (
        lambda: kernels.select_topk(case.x.double(), *case.encoder[1:], k=3),
        TypeError,
        "W_enc is torch.float32",
    ),
    "vector": (lambda: kernels.select_topk(case.x[0], *case.encoder[1:], k=3), ValueError, "must be matrices"),
    "width": (lambda: kernels.select_topk(case.x[:, :5], *case.encoder[1:], k=3), ValueError, "x has 5 columns"),
    "b_enc": (lambda: kernels.select_topk(case.x, case.W_enc, case.b_dec, None, k=3), ValueError, "b_enc has shape"),
    "b_dec": (lambda: kernels.select_topk(case.x, case.W_enc, None, case.b_enc, k=3), ValueError, "b_dec has shape"),
    "k-0": (lambda: kernels.select_topk(*case.encoder, k=0), ValueError, "k=0 is outside 1..d_sae=20"),
    "k-21": (lambda: kernels.select_topk(*case.encoder, k=21), ValueError, "k=21 is outside"),
    "k-float": (lambda: kernels.select_topk(*case.encoder, k=3.0), TypeError, "k=3.0 must be an int"),  # pyright: ignore
    "budget": (lambda: kernels.select_batch(*case.encoder, budget=81), ValueError, "budget=81"),
    "budgets": (
        lambda: kernels.select_latent(*case.encoder, budgets=torch.ones(20)),
        ValueError,
        "budgets must be int64",
    ),
    "negative": (
        lambda: kernels.select_latent(*case.encoder, budgets=torch.full((20,), -1)),
        ValueError,
        "fewer than 0 tokens",
    ),
    "threshold": (
        lambda: kernels.select_threshold(*case.encoder, threshold=torch.ones(3)),
        ValueError,
        "threshold has shape",
    ),
    "beta": (
        lambda: kernels.select_gradient_topk(case.x, case.x, *case.encoder[1:], case.W_dec, 3, beta=-1.0),
        ValueError,
        "beta=-1.0",
    ),
    "grads": (
        lambda: kernels.select_gradient_topk(case.x, case.x[:2], *case.encoder[1:], case.W_dec, 3, beta=1.0),
        ValueError,
        "grads [2, 6] must have the rows of x [4, 6]",
    ),
    "grad_norm": (
        lambda: kernels.select_gradient_topk(case.x, case.x, *case.encoder[1:], case.W_dec, 3, 1.0, "max"),  # pyright: ignore
        ValueError,
        "grad_norm='max'",
    ),
    "latent": (
        lambda: kernels.decode(code[0], torch.tensor([1, 20]), code[2], case.W_dec, None),
        ValueError,
        "indices span 1..20",
    ),
    "row_ptr": (
        lambda: kernels.decode(code[0], code[1], torch.tensor([0, 3, 2]), case.W_dec, None),
        ValueError,
        "row_ptr must rise from 0 to nnz=2",
    ),
    "int32": (
        lambda: kernels.decode(code[0], code[1].int(), code[2], case.W_dec, None),
        TypeError,
        "indices is torch.int32",
    ),
    "rows": (lambda: kernels.sse(case.x, *code, case.W_dec, None), ValueError, "the code has 2 rows but x has 4"),
    "steps": (lambda: kernels.pursuit(case.x, case.W_dec, None, 0), ValueError, "n_steps=0"),
    "stop": (lambda: kernels.pursuit(case.x, case.W_dec, None, 2, float("nan")), ValueError, "residual_stop=nan"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused(name: str) -> None:
    call, error, words = REFUSALS[name]
    with pytest.raises(error, match=words.replace(".", r"\.").replace("[", r"\[").replace("*", r"\*")):
        call()


def test_unknown_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown kernel backend 'cuda'"), kernels.use_backend("cuda"):
        pass
    monkeypatch.setenv("SAELAB_KERNELS", "fast")
    with pytest.raises(ValueError, match="choose from reference, numba, triton"):
        kernels.select_topk(*case.encoder, k=3)


def test_a_named_backend_never_hands_over_in_silence() -> None:
    with kernels.use_backend("reference"):
        assert kernels.backend(case.x) == "reference"
        assert kernels.describe().startswith("reference (plain PyTorch")
