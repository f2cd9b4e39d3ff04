"""SAEBench's own code on our SAEs: its ``BaseSAE`` contract and its core evaluation, with local model and text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saelab import load_model
from saelab.errors import UserError
from saelab.interop.saebench import as_base_sae, core
from saelab.sae import SAE, VARIANTS, build
from tests.interop.examples import D_IN, D_SAE, example, probe
from tests.tiny_lm import save_llama, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other tools' warnings are theirs
    pytest.mark.slow,
]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("sae_bench", reason="SAEBench is not installed here; run `make test-interop`")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save_llama(folder / "model")
    (folder / "text").mkdir()
    lines = [json.dumps({"text": sentences(300, seed=i)}) for i in range(40)]
    (folder / "text" / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_adapter_keeps_saebenchs_contract(variant: str) -> None:
    sae, x = example(variant), probe(24)
    adapter = as_base_sae(sae, "tiny", HOOK)
    width = adapter.cfg.d_sae
    assert adapter.W_enc.shape == (D_IN, width)
    assert adapter.W_dec.shape == (width, D_IN)
    assert adapter.check_decoder_norms()
    codes = adapter.encode(x.reshape(4, 6, D_IN))
    assert codes.shape == (4, 6, width)
    assert bool((codes >= 0).all())
    dense = codes.reshape(24, width)
    if width == 2 * D_SAE:
        dense = dense[:, :D_SAE] - dense[:, D_SAE:]
    torch.testing.assert_close(dense, sae.encode(x).dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter(x), sae(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.decode(codes).reshape(24, D_IN), sae(x), rtol=1e-5, atol=1e-5)


def exact() -> SAE:
    """An SAE that reconstructs everything: each direction and its opposite."""
    sae = build("relu", D_IN, 2 * D_IN).eval()
    eye = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    with torch.no_grad():
        sae.W_dec.copy_(eye)
        sae.W_enc.copy_(eye.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def test_core_evaluation_of_an_exact_sae_finds_no_damage(place: Path) -> None:
    model = load_model(place / "model")
    adapter = as_base_sae(exact(), str(place / "model"), HOOK, context_size=32)
    found = core(adapter, model, place / "text", n_reconstruction_batches=2, batch_size=4)
    behaviour, quality = found["model_performance_preservation"], found["reconstruction_quality"]
    assert behaviour["ce_loss_with_sae"] == pytest.approx(behaviour["ce_loss_without_sae"], abs=1e-4)
    assert behaviour["ce_loss_with_ablation"] != pytest.approx(behaviour["ce_loss_without_sae"], abs=1e-3)
    assert behaviour["ce_loss_score"] == pytest.approx(1, abs=1e-2)
    assert quality["cossim"] == pytest.approx(1, abs=1e-5)
    assert quality["mse"] == pytest.approx(0, abs=1e-9)
    assert found["sparsity"]["l0"] == pytest.approx(D_IN, abs=0.01)
    assert found["misc_metrics"]["frac_alive"] == 1


@pytest.mark.parametrize("variant", ["topk", "abs_topk"])
def test_core_evaluation_sees_the_sparsity_that_we_see(variant: str, place: Path) -> None:
    sae = example(variant)
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.b_enc.zero_()
    adapter = as_base_sae(sae, str(place / "model"), HOOK, context_size=32)
    found = core(adapter, load_model(place / "model"), place / "text", n_reconstruction_batches=1, batch_size=4)
    assert found["sparsity"]["l0"] == pytest.approx(4, abs=0.05)
    assert 0 < found["misc_metrics"]["frac_alive"] <= 1
    assert found["model_behavior_preservation"]["kl_div_with_sae"] > 0


def test_a_hook_without_a_layer_is_refused() -> None:
    with pytest.raises(UserError, match="names no layer"):
        as_base_sae(example("topk"), "tiny", "hook_embed")
