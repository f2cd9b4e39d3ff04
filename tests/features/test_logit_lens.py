"""The unembedding that the logit lens uses, against the models' own logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saelab.features import LogitLens
from saelab.lm import load_model, unembedding
from saelab.lm.unembed import _adds_one
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


class OnePlus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt() * (1 + self.weight)


def test_a_norm_that_multiplies_by_one_plus_its_weight_is_told() -> None:
    assert _adds_one(OnePlus())
    assert not _adds_one(nn.LayerNorm(8))
    plain = nn.RMSNorm(8)
    nn.init.uniform_(plain.weight, 0.5, 3.0)
    assert not _adds_one(plain)
