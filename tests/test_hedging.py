"""Hedging of dictionaries whose mixing is planted, and over the widths of a sweep."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import UserError
from saelab.metrics.hedging import hedging


def unit(W: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(W, dim=1)


def test_what_is_mixed_in_is_measured_and_noise_is_not() -> None:
    """20 latents that each hold 0.4 of one of 8 features of which only the wider dictionary has latents."""
    d = 64
    basis = torch.linalg.qr(torch.randn(d, d)).Q
    wide = basis[:28]
    mixed = wide[:20] + 0.4 * wide[20 + torch.arange(20) % 8]
    found = hedging(unit(mixed), wide)
    change = (wide[:20] - unit(mixed)) @ wide[20:].T
    assert found.projected == pytest.approx(float(change.norm(dim=1).mean()), abs=1e-5)
    assert found.matched == 20 and found.new == 8
    assert found.rate > 0.2 and found.projected > found.baseline + 5 * found.baseline_sd
    noise = unit(wide[:20] + 0.4 * unit(torch.randn(20, d)))
    assert hedging(noise, wide).rate < 0.06
    assert hedging(wide[:20], wide).rate == 0
    assert hedging(unit(mixed) * torch.rand(20, 1), 3 * wide).rate == pytest.approx(found.rate, abs=1e-5)
    turned = unit(mixed) * torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0)[:, None]
    assert hedging(turned, wide, signed=True).rate == pytest.approx(found.rate, abs=1e-5)


def test_what_cannot_be_compared_is_refused() -> None:
    W = torch.eye(12)
    with pytest.raises(UserError, match="wider one"):
        hedging(W[:4], W[:4])
    with pytest.raises(UserError, match="nothing can be said"):
        hedging(W[:2], W[2:])
