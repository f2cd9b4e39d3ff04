"""The other tools themselves, where they are installed: SAELens, sparsify, dictionary_learning on our files.

They need transformer-lens below 4, so they live in an environment of their own (``make test-interop``).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.errors import UserError
from saelab.interop import export, load
from saelab.sae import VARIANTS
from saelab.sae.weights import save
from tests.interop.examples import example, probe

pytestmark = pytest.mark.filterwarnings("ignore")  # other tools' warnings are theirs

# Both sides evaluate the same float32 formula; sums of d_in = 16 products differ by a few ulp.
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def sae_lens():
    return pytest.importorskip("sae_lens", reason="SAELens is not installed here; run `make test-interop`")


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_run_folders_load_in_saelens_with_equal_codes(sae_lens, variant: str, tmp_path: Path) -> None:
    sae = example(variant)
    save(sae, tmp_path / "run", {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "run")
    x = probe()
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).dense(), **EXACT)
    torch.testing.assert_close(theirs(x), sae(x), **EXACT)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


def test_signed_sae_reaches_saelens_as_doubled_topk(sae_lens, tmp_path: Path) -> None:
    sae = example("batch_topk", signed=True)
    export(sae, tmp_path / "out", "saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    x = probe()
    code = theirs.encode(x)
    torch.testing.assert_close(code[:, :40] - code[:, 40:], sae.encode(x).dense(), **EXACT)


@pytest.mark.parametrize("architecture", ["standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit"])
@pytest.mark.parametrize("subtract", [True, False])
def test_saelens_saes_load_here(sae_lens, architecture: str, subtract: bool, tmp_path: Path) -> None:
    cls, config = sae_lens.registry.get_sae_class(architecture)
    extra = {"k": 4} if architecture in {"topk", "abstopk"} else {}
    extra |= {"max_iterations": 5} if architecture == "matching_pursuit" else {}
    theirs = cls(config(d_in=16, d_sae=40, apply_b_dec_to_input=subtract, **extra))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        if architecture == "matching_pursuit":
            theirs.W_dec /= theirs.W_dec.norm(dim=1, keepdim=True)
        if architecture == "jumprelu":
            theirs.threshold.abs_()
    theirs.save_model(tmp_path / "theirs")
    ours, x = load(tmp_path / "theirs"), probe()
    torch.testing.assert_close(ours.encode(x).dense(), theirs.encode(x), **EXACT)
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)


def test_sparsify_round_trip(tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify", reason="sparsify is not installed here; run `make test-interop`")
    sae, x = example("topk"), probe()
    export(sae, tmp_path / "out", "sparsify")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "out")
    torch.testing.assert_close(theirs.decode(*theirs.encode(x)[:2]), sae(x), **EXACT)
    theirs.cfg.num_latents = 0  # what the default configuration stores
    theirs.save_to_disk(tmp_path / "theirs")
    torch.testing.assert_close(load(tmp_path / "theirs").encode(x).dense(), sae.encode(x).dense(), **EXACT)


@pytest.mark.parametrize("variant", ["topk", "batch_topk"])
def test_dictionary_learning_loads_ours(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("dictionary_learning", reason="dictionary_learning is not installed; run `make test-interop`")
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import top_k

    sae, x = example(variant), probe()
    export(sae, tmp_path / "out", "dictionary-learning")
    state = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    theirs = top_k.AutoEncoderTopK(16, 40, 4) if variant == "topk" else dictionary.JumpReluAutoEncoder(16, 40)
    theirs.load_state_dict(state)
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).dense(), **EXACT)
    torch.testing.assert_close(theirs(x), sae(x), **EXACT)


class Anything(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def overcomplete(monkeypatch: pytest.MonkeyPatch) -> Any:
    """overcomplete's SAE classes, without the vision models and figures that it imports with them."""
    if importlib.util.find_spec("overcomplete") is None:
        pytest.skip("overcomplete is not installed; run `make test-interop`")
    with monkeypatch.context() as stubs:
        for name in ("torchvision", "timm", "overcomplete.visualization"):
            stubs.setitem(sys.modules, name, Anything(name))
        return importlib.import_module("overcomplete.sae")


@pytest.mark.parametrize("kind", ["topk", "plain", "batch_topk", "jump", "pursuit", "archetypal"])
def test_overcompletes_own_classes_load_here(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oc = overcomplete(monkeypatch)
    torch.manual_seed(2)
    x = probe(128)
    classes = {
        "topk": (oc.TopKSAE, {"top_k": 5}, {"k": 5}),
        "plain": (oc.SAE, {}, {}),
        "batch_topk": (oc.BatchTopKSAE, {"top_k": 500}, {}),
        "jump": (oc.JumpSAE, {}, {}),
        "pursuit": (oc.MpSAE, {"k": 4}, {"k": 4, "pursuit": True}),
        "archetypal": (oc.RATopKSAE, {"top_k": 5, "points": probe(60)}, {"k": 5}),
    }
    cls, config, told = classes[kind]
    theirs = cls(16, 40, **config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(mean=-0.5 if name == "thresholds" else 0.0, std=0.3)
    theirs.train()(x)  # normalises the dictionary and sets the running threshold, as any training step does
    theirs.eval()
    torch.save(theirs.state_dict(), tmp_path / "sae.pt")
    if kind == "batch_topk":
        told = {"threshold": float(theirs.running_threshold)}
    with torch.no_grad():
        _, codes, recon = theirs(x)
    assert 0 < (codes != 0).sum() < codes.numel()
    ours = load(tmp_path / "sae.pt", is_sae=True, **told)  # with random directions it could be a transcoder
    torch.testing.assert_close(ours.encode(x).dense(), codes, **EXACT)
    torch.testing.assert_close(ours(x), recon, **EXACT)


@pytest.mark.parametrize("kind", ["QSAE", "MpSAE", "deep"])
def test_overcomplete_classes_without_a_counterpart_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oc = overcomplete(monkeypatch)
    theirs = oc.SAE(16, 40, encoder_module="mlp_bn_3") if kind == "deep" else getattr(oc, kind)(16, 40)
    torch.save(theirs.state_dict(), tmp_path / "sae.pt")
    with pytest.raises(UserError, match=r"no counterpart|has no encoder|linear encoder"):
        load(tmp_path / "sae.pt")
