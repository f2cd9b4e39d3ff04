"""Codes of ``topk``, ``abs_topk`` and ``matching_pursuit`` on given weights: published formulas, and SAELens itself.

SAELens needs another environment than the tests' own (transformer-lens < 4); without it only the formulas are checked.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.sae import SAE, build

D_IN, D_SAE, N, K = 24, 96, 200, 7

CASES = [
    ("topk", {"k": K}),
    ("abs_topk", {"k": K}),
    ("abs_topk", {"k": K, "apply_b_dec_to_input": False}),
    ("matching_pursuit", {"n_steps": K}),
    ("matching_pursuit", {"n_steps": 30, "residual_stop": 1.5}),
    ("matching_pursuit", {"n_steps": 30, "stop_on_repeat": True}),
]
cases = pytest.mark.parametrize(("name", "config"), CASES, ids=lambda value: value if isinstance(value, str) else None)


def weights(name: str, config: dict[str, Any]) -> tuple[SAE, Tensor]:
    """An SAE in float64 with weights in general position, and tokens; a shift leaves some with few positives."""
    sae = build(name, D_IN, D_SAE, **config).double().eval()
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
            if key == "b_enc":
                parameter.sub_(1.5 * torch.rand(D_SAE))
    return sae, torch.randn(N, D_IN, dtype=torch.float64)


def topk(sae: SAE, x: Tensor) -> Tensor:
    u = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    rank = (u[:, None, :] > u[:, :, None]).sum(dim=2)  # how many are larger
    return u.relu() * (rank < K)


def abs_topk(sae: SAE, x: Tensor) -> Tensor:
    u = (x - sae.b_dec if sae.config["apply_b_dec_to_input"] else x) @ sae.W_enc + sae.b_enc
    rank = (u.abs()[:, None, :] > u.abs()[:, :, None]).sum(dim=2)
    return u * (rank < K)


def matching_pursuit(sae: SAE, x: Tensor) -> Tensor:
    """Token by token, atom by atom."""
    z = torch.zeros(len(x), D_SAE, dtype=x.dtype)
    for token, code in zip(x, z):
        residual = token - sae.b_dec
        for _ in range(sae.config["n_steps"]):
            if residual.norm() < sae.config["residual_stop"]:
                break
            products = [float(atom @ residual) for atom in sae.W_dec]
            j = max(range(D_SAE), key=products.__getitem__)
            again = bool(code[j] > 0)
            if products[j] <= 0:
                break
            code[j] += products[j]
            residual = residual - products[j] * sae.W_dec[j]
            if again and sae.config["stop_on_repeat"]:
                break
    return z


@cases
def test_code_follows_the_formula(name: str, config: dict[str, Any]) -> None:
    sae, x = weights(name, config)
    with torch.no_grad():
        expected = globals()[name](sae, x)
        torch.testing.assert_close(sae.encode(x).dense(), expected)
        torch.testing.assert_close(sae(x), expected @ sae.W_dec + sae.b_dec)


def saelens_twin(name: str, sae: SAE) -> Any:
    """SAELens' own class with the same weights."""
    import sae_lens

    common: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", "device": "cpu"}
    common["apply_b_dec_to_input"] = sae.config.get("apply_b_dec_to_input", True)
    if name == "matching_pursuit":
        config = sae_lens.MatchingPursuitSAEConfig(
            **common,
            max_iterations=sae.config["n_steps"],
            residual_threshold=sae.config["residual_stop"],
            stop_on_duplicate_support=sae.config["stop_on_repeat"],
        )
        twin = sae_lens.MatchingPursuitSAE(config)
    elif name == "abs_topk":
        twin = sae_lens.AbsTopKSAE(sae_lens.AbsTopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=False))
    else:
        twin = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=False))
    twin.load_state_dict({key: value.detach().contiguous() for key, value in sae.named_parameters()})
    return twin.eval()


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="SAELens is not installed here")
@cases
def test_code_equals_saelens(name: str, config: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what SAELens' imports warn about is not ours to mend
        sae, x = weights(name, config)
        twin = saelens_twin(name, sae)
        assert sae.saelens == twin.cfg.architecture()
        with torch.no_grad():
            torch.testing.assert_close(sae.encode(x).dense(), twin.encode(x))
            torch.testing.assert_close(sae(x), twin(x))
