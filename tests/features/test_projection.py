"""The map: similar directions lie together, and a map of other weights is not shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saelab.cli import main
from saelab.errors import UserError
from saelab.features.projection import lay_out, load_map, save_map
from saelab.runs import Run
from saelab.sae import build
from saelab.sae.weights import save


def test_similar_directions_lie_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sae = build("topk", d_in=16, d_sae=60, k=3)
    centres = torch.nn.functional.normalize(torch.randn(3, 16), dim=1)
    group = torch.arange(60) % 3
    with torch.no_grad():
        sae.W_dec.copy_((centres[group] + 0.1 * torch.randn(60, 16)) * (1 + torch.rand(60, 1)))
    places = lay_out(sae)
    at = places[["x", "y"]].to_numpy()
    apart = ((at[:, None] - at[None]) ** 2).sum(2) + np.diag(np.full(60, np.inf))
    assert (group.numpy()[apart.argmin(1)] == group.numpy()).all()
    assert lay_out(sae, np.arange(10, 40), most=20)["latent"].between(10, 39).all()
    assert len(lay_out(sae, most=20)) == 20
    with pytest.raises(UserError, match="four"):
        lay_out(sae, np.array([1, 2, 3]))
    save(sae, tmp_path / "run", {})
    main(["map", str(tmp_path / "run"), "--most", "30"])
    assert "30 latents" in capsys.readouterr().out
    own = Run.open(tmp_path / "run").fingerprint
    found = load_map(tmp_path / "run", own)
    assert found is not None and len(found) == 30
    assert load_map(tmp_path / "run", "other weights") is None and load_map(tmp_path, own) is None
    save_map(tmp_path / "run", places, own)
    assert len(load_map(tmp_path / "run", own)) == 60
    (tmp_path / "run" / "map.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match="saelab map"):
        load_map(tmp_path / "run", own)
