"""The unembedding that the logit lens uses, against the models' own logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saelab.features import LogitLens
from saelab.features.indexing.logit_lens import neighbours
from saelab.lm import load_model, unembedding
from saelab.lm.unembed import _probe
from tests.tiny_lm import save_gpt2, save_llama


@pytest.mark.parametrize("save", [save_llama, save_gpt2], ids=["rms_norm", "layer_norm"])
def test_a_direction_moves_the_logits_as_the_lens_says(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    model = load_model(save(tmp_path / "model"))
    final = unembedding(model)
    direction = torch.randn(16)
    x = torch.randn(1, 5, 16) * 3

    def logits(x: Tensor) -> Tensor:
        return model.unembed(model.ln_final(x))

    # The lens leaves out the division by the token's norm: held fixed, the head is linear.
    centred = x - x.mean(-1, keepdim=True) if final.centred else x
    scale = centred.square().mean(-1, keepdim=True).sqrt()
    step = 1e-2
    with torch.no_grad():
        moved = (logits(x + step * direction) - logits(x - step * direction)) / (2 * step)
        # The change of the norm itself adds a multiple of the normalised x.
        along = (centred * direction).mean(-1, keepdim=True) / scale**3
        weight = final.norm_weight
        assert weight is not None
        fixed = scale * (moved + (centred * along * weight) @ final.weight)
    fixed = fixed - fixed.mean(-1, keepdim=True)
    lens = LogitLens(final.weight, final.norm_weight, final.centred)
    effects = lens.effects(direction[None]).expand_as(fixed[0])
    torch.testing.assert_close(fixed[0], effects, rtol=1e-2, atol=1e-2 * float(effects.abs().max()))
    assert final.centred == (save is save_gpt2)


@pytest.mark.parametrize("m", [3, 160], ids=["few directions", "as many as are screened"])
@pytest.mark.parametrize("tokens", [7, 4096])
def test_extremes_are_those_of_all_logits(m: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    unembed = torch.randn(256, tokens, generator=generator) + 0.5  # a mean that the lens takes away
    norm, directions = torch.rand(256, generator=generator) + 0.5, torch.randn(m, 256, generator=generator)
    logits = (directions * norm).double() @ unembed.double()
    logits -= logits.mean(1, keepdim=True)
    n = min(10, tokens)
    for (values, ids), largest in zip(LogitLens(unembed, norm).extremes(directions, 10), (True, False)):
        expected = logits.topk(n, dim=1, largest=largest)
        torch.testing.assert_close(values.double(), expected.values, rtol=1e-5, atol=1e-4)
        assert ids.tolist() == expected.indices.tolist()


@pytest.mark.parametrize("signed", [False, True])
def test_neighbours_are_the_closest_of_all_rows(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2048, 256, generator=generator)
    rows[7], rows[9] = rows[1200], -rows[1300]  # a twin, and one that points the other way
    rows[11] = 0
    unit = torch.nn.functional.normalize(rows, dim=1)
    cosines, numbers = neighbours(unit, 0, 200, 4, signed)
    key = unit[:200].double() @ unit.T.double()
    every, key = key, key.abs() if signed else key
    key[torch.arange(200), torch.arange(200)] = -torch.inf
    # Which of two twins comes first is open, and which rows are the closest to one of zeros.
    torch.testing.assert_close(cosines.double(), every.gather(1, numbers), rtol=0, atol=1e-6)
    torch.testing.assert_close(key.gather(1, numbers), key.topk(4, dim=1).values, rtol=0, atol=1e-6)
    assert all(len(set(line)) == 4 for line in numbers.tolist())


class OnePlus(nn.Module):
    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt() * (1 + self.weight)


@pytest.mark.parametrize("d_in", [8, 9])
def test_a_norm_is_told_by_what_it_does(d_in: int) -> None:
    def probed(norm: nn.Module) -> bool:
        if isinstance(getattr(norm, "weight", None), nn.Parameter):
            nn.init.uniform_(norm.get_parameter("weight"), 0.5, 3.0)
        weight, centred = _probe(norm, d_in)
        expected = norm.weight + float(isinstance(norm, OnePlus)) if hasattr(norm, "weight") else torch.ones(d_in)
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-4, atol=1e-4)
        return centred

    assert not probed(OnePlus(d_in))
    assert not probed(nn.RMSNorm(d_in))
    assert probed(nn.LayerNorm(d_in))
    assert probed(Unnamed())


class Unnamed(nn.Module):
    """A centring norm without weights that is not of a class of torch, as OLMo 1 has it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:])
