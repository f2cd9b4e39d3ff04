"""Fine-tuning goes on from the weights it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saelab import ActivationCache, build, load
from saelab.train import TrainConfig, adopt, train


def test_fine_tuning_starts_where_the_sae_is(tmp_path: Path) -> None:
    truth = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)
    active = (torch.rand(2048, 12) < 0.15) * (1 + torch.rand(2048, 12))
    cache = ActivationCache.from_tensors(tmp_path / "cache", 20 * active @ truth)
    config = TrainConfig(epochs=10, batch_size=128, lr=3e-3)
    sae = build("topk", d_in=8, d_sae=12, k=3)
    trained = list(train(sae, cache, config))[-1]
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    state = adopt(sae, cache)
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())
    again = list(train(sae, cache, TrainConfig(epochs=1, batch_size=128, lr=1e-4, warmup=0.0), state))
    # From scratch the first step has an FVU near 1.
    assert abs(again[0].fvu - trained.fvu) < 0.1
    assert again[-1].fvu < again[0].fvu + 0.05
    assert any(not torch.equal(value, weights[name]) for name, value in sae.state_dict().items())


def planted(folder: Path, size: float) -> ActivationCache:
    """Activations whose norm, and with it the scale that training applies, is far from 1."""
    truth = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)
    active = (torch.rand(2048, 12) < 0.15) * (1 + torch.rand(2048, 12))
    return ActivationCache.from_tensors(folder, size * active @ truth + size)


@pytest.mark.parametrize("size", [0.02, 30.0])
@pytest.mark.parametrize("form", ["sparsify", "saelens", "gemma_scope", "dictionary_learning"])
def test_the_loss_starts_where_the_imported_sae_ends(form: str, size: float, tmp_path: Path) -> None:
    """The first step reports the FVU that the imported SAE has on that batch, summed here in float64."""
    cache = planted(tmp_path / "cache", size)
    assert cache.manifest.scale != 1
    sae = load(foreign(form, size, tmp_path / "theirs"))
    config = TrainConfig(epochs=1, batch_size=256, lr=1e-4, warmup=0.0)
    batch = next(cache.batches(256, seed=config.data_seed))
    x = batch.acts.double()
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    with torch.no_grad():
        error = (x - sae(batch.acts).double()).square().sum() / len(x)
    expected = float(error / cache.manifest.variance)
    steps = list(train(sae, cache, config, adopt(sae, cache)))
    # float32 sums of 8 x 256 squares, and a threshold's pre-activations on its edge.
    assert steps[0].fvu == pytest.approx(expected, rel=1e-4)
    assert steps[-1].fvu < expected
    assert any(not torch.equal(value, weights[name]) for name, value in sae.state_dict().items())


def foreign(form: str, size: float, folder: Path) -> Path:
    """An SAE of moderate quality as another tool stores it, in raw units of activations of that size."""
    folder.mkdir()
    torch.manual_seed(5)
    W_dec = torch.nn.functional.normalize(torch.randn(24, 8), dim=1)
    W_enc, b_enc, b_dec = W_dec.T.contiguous(), size * 0.1 * torch.randn(24), torch.full((8,), size)
    linear = {"encoder.weight": W_enc.T.contiguous(), "encoder.bias": b_enc}
    if form == "sparsify":
        save_file({**linear, "W_dec": W_dec, "b_dec": b_dec}, folder / "sae.safetensors")
        (folder / "cfg.json").write_text('{"activation": "topk", "num_latents": 0, "k": 3}')
    elif form == "saelens":
        config = {"architecture": "standard", "d_in": 8, "d_sae": 24, "metadata": {"sae_lens_version": "6.5.0"}}
        save_file({"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(config))
    elif form == "gemma_scope":
        tensors = {"w_enc": W_enc, "b_enc": b_enc - b_dec @ W_enc, "w_dec": W_dec, "b_dec": b_dec}
        save_file({**tensors, "threshold": torch.full((24,), size * 0.2)}, folder / "params.safetensors")
    else:  # a mid-run backup, whose norm factor must be folded in
        state = {**linear, "decoder.weight": W_dec.T.contiguous(), "b_dec": b_dec, "k": torch.tensor(3)}
        state = {key: value / size if key in {"encoder.bias", "b_dec"} else value for key, value in state.items()}
        torch.save({"step": 1, "ae": state, "optimizer": {}, "config": {}, "norm_factor": size}, folder / "ae.pt")
        (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoderTopK"}}')
    return folder
