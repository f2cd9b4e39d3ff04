"""Training, evaluation, the index and steering on a GPU agree with the CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.data.cache import ActivationCache
from saelab.evaluation import EvaluateConfig, evaluate
from saelab.features import build_index
from saelab.harvesting import HarvestConfig, harvest
from saelab.lm import load_hf_model, load_model
from saelab.sae import build
from saelab.steering import Ablate, Add, Run, SteeringVector, generate_tokens
from saelab.training import TrainConfig, train
from tests import tiny_lm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    tiny_lm.save_llama(root / "model")
    (root / "text.txt").write_text(tiny_lm.sentences(2000))
    config = HarvestConfig(tokens=2000, context_length=20, held_out=0.2, dtype="float32")
    harvest(load_model(root / "model"), HOOK, root / "text.txt", root / "cache", config)
    return root


def small_sae(cache: ActivationCache, device: str) -> Any:
    torch.manual_seed(0)
    sae = build("topk", d_in=cache.d_in, d_sae=64, k=4).eval()
    with torch.no_grad():
        sae.b_dec.copy_(torch.tensor(cache.manifest.mean))
    return sae.to(device)


def test_training_lowers_the_error_as_on_the_cpu(folder: Path) -> None:
    cache, fvu = ActivationCache(folder / "cache"), {}
    for device in ("cpu", "cuda"):
        sae = small_sae(cache, device).train()
        last = train(sae, cache, TrainConfig(epochs=5, batch_size=128, lr=1e-2))
        assert last is not None
        fvu[device] = last.fvu
        assert sae.W_dec.device.type == device
    # Ties and sums fall differently, and training carries differences on: the same quality, not the same weights.
    assert fvu["cuda"] == pytest.approx(fvu["cpu"], rel=0.1)


def test_evaluation_gives_the_numbers_of_the_cpu(folder: Path) -> None:
    cache = ActivationCache(folder / "cache")
    config = EvaluateConfig(density_tokens=0)
    expected = evaluate(small_sae(cache, "cpu"), cache, load_hf_model(folder / "model", device="cpu"), config)
    for load in (load_hf_model, load_model):
        for device in ("cpu", "cuda"):
            got = evaluate(small_sae(cache, device), cache, load(folder / "model", device="cuda"), config)
            for name in ("fvu", "l0", "ce_loss_with_sae", "ce_loss_with_mean_ablation", "kl_div_with_sae"):
                assert got[name] == pytest.approx(expected[name], rel=1e-3), name


def test_the_index_is_that_of_the_cpu(folder: Path, tmp_path: Path) -> None:
    cache, tables = ActivationCache(folder / "cache"), {}
    for device in ("cpu", "cuda"):
        index = build_index(
            small_sae(cache, device), cache, tmp_path / device, token_strings=list(map(str, range(999)))
        )
        tables[device] = index.table()
    for name in ("count", "max", "mean", "q50", "token_entropy", "norm_corr", "decoder_norm"):
        expected = tables["cpu"][name].to_numpy()
        assert tables["cuda"][name].to_numpy() == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True), name


def test_steering_writes_what_the_cpu_writes(folder: Path) -> None:
    cache, ids = ActivationCache(folder / "cache"), torch.tensor([[0, 50, 7, 200]])

    def written(model: Any, device: str) -> list[list[int]]:
        run = Run(small_sae(cache, device), HOOK)
        steps = [Add(SteeringVector.from_latent(run, 3), 5.0), Ablate(run, 5)]
        return generate_tokens(model, ids, None, steps, max_new_tokens=5)

    expected = written(load_hf_model(folder / "model", device="cpu"), "cpu")
    for load in (load_hf_model, load_model):
        for device in ("cpu", "cuda"):
            assert written(load(folder / "model", device="cuda"), device) == expected
