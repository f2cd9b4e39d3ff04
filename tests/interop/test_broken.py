"""Malicious and broken files: refused in one line, quickly, with nothing executed."""

from __future__ import annotations

import json
import pickle
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saelab import kernels
from saelab.errors import UserError
from saelab.interop import FORMATS, export, load, prove
from saelab.interop.fetch import split_id
from saelab.layout import WEIGHTS
from saelab.runs.inspection import inspect
from saelab.sae import SAE, LinearSAE, Normalised, build
from saelab.sae.weights import save
from tests.interop.examples import D_IN, D_SAE, example

# One folder serves all examples of a test: each overwrites the file before it reads it.
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = ["d_in", "d_sae", "k", "architecture", "metadata"]


class Bomb:
    """Touches a file when unpickled by a careless reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def refused(path: Path, match: str) -> None:
    started = time.perf_counter()
    with pytest.raises(UserError, match=match) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_code_in_a_pickle_does_not_run(protocol: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    content = {"latent_bias": torch.zeros(3), "bomb": Bomb(touched)}
    if protocol == "torch":
        torch.save(content, tmp_path / "sae.pt")
    else:
        (tmp_path / "sae.pt").write_bytes(pickle.dumps(content))
    refused(tmp_path / "sae.pt", "run code|not a readable")
    assert not touched.exists()


def run_folder(tmp_path: Path) -> Path:
    save(example("topk"), tmp_path / "run", {})
    return tmp_path / "run"


@pytest.mark.parametrize("keep", [0, 7, 100, 3000])
def test_truncated_weights(keep: int, tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    weights = run / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(run, "truncated|damaged|does not hold")


def test_npz_bomb(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("W_enc.npy", "w") as entry:
        for _ in range(64):
            entry.write(bytes(2**20))
    # 64 MiB of zeros pack to 64 KiB: just above the ratio that is let through.
    refused(path, "would unpack|not a readable npz|no matrix")


@pytest.mark.parametrize(("d_in", "d_sae"), [(2**40, 4), (-1, 4), ("x", 4), (D_IN, 0), (D_IN + 1, D_SAE)])
def test_absurd_shapes(d_in: object, d_sae: object, tmp_path: Path) -> None:
    save_file({"W_dec": torch.zeros(D_SAE, D_IN)}, tmp_path / "sae_weights.safetensors")
    config = {"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": 4, "metadata": {"sae_lens_version": "6.5.0"}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    refused(tmp_path, "not a width|has shape|has no tensor")


def test_nan_weights(tmp_path: Path) -> None:
    sae = example("topk")
    export(sae, tmp_path / "out", "sparsify")
    broken = {"encoder.weight": sae.W_enc.T.contiguous().detach(), "encoder.bias": sae.b_enc.detach() * float("nan")}
    save_file(
        {**broken, "W_dec": sae.W_dec.detach(), "b_dec": sae.b_dec.detach()}, tmp_path / "out" / "sae.safetensors"
    )
    refused(tmp_path / "out", "NaN")


@pytest.mark.parametrize("hub_id", ["../../etc/passwd", "org/../x", "org/repo/../../x", "org", "org/re po", "org//x"])
def test_path_traversal_in_a_hub_id(hub_id: str) -> None:
    with pytest.raises(UserError, match="hub id"):
        split_id(hub_id)


def test_nothing_recognisable(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, "no SAE format known here")
    refused(tmp_path / "missing", "does not exist")


@FUZZ
@given(data=st.binary(max_size=400), name=st.sampled_from(["sae.pt", "params.npz", "params.safetensors", "ae.pt"]))
def test_random_bytes_never_crash(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError):
        load(path)


@FUZZ
@given(config=st.dictionaries(st.sampled_from(KEYS), st.none() | st.integers() | st.text(max_size=8)))
def test_random_configurations_never_crash(tmp_path: Path, config: dict) -> None:
    save_file({"W_dec": torch.zeros(D_SAE, D_IN)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load(tmp_path)


def test_export_refuses_to_overwrite_and_to_guess(tmp_path: Path) -> None:
    sae = example("topk")
    export(sae, tmp_path / "out", "saelens")
    with pytest.raises(UserError, match="exists"):
        export(sae, tmp_path / "out", "saelens")
    with pytest.raises(UserError, match="did you mean saelens"):
        export(sae, tmp_path / "new", "sae-lens")
    with pytest.raises(UserError, match="TopK only"):
        export(example("relu"), tmp_path / "new", "sparsify")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_export_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = FORMATS["saelens"].write

    def wrong(form, folder, metadata):
        tensors = {**form.tensors, "b_enc": form.tensors["b_enc"] + 0.5}
        true(type(form)(form.architecture, tensors, form.config), folder, metadata)

    monkeypatch.setitem(FORMATS, "saelens", FORMATS["saelens"]._replace(write=wrong))
    with pytest.raises(UserError, match="differs from the SAE"):
        export(example("jump_relu"), tmp_path / "out", "saelens")
    assert list(tmp_path.iterdir()) == []


class OwnRule(LinearSAE):
    """Selects the first latents, whatever they are worth."""

    variant = "own_rule"

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__(d_in, d_sae)

    def select(self, x, grads):
        return kernels.select_topk(x, self.W_enc[:, :2], self.b_enc[:2], self.b_in, 1, False)


def test_a_refused_export_says_why(tmp_path: Path) -> None:
    centred = Normalised(example("topk"), "center").eval()
    for sae, reason in (
        (OwnRule(D_IN, D_SAE).eval(), "selects latents by a rule of its own"),
        (build("gradient_topk", D_IN, D_SAE, k=2, grad_select="train_and_eval").eval(), "uses gradients of the lang"),
        (centred, "has no linear encoder on raw activations"),
    ):
        with pytest.raises(UserError, match=f"a {sae.variant} SAE {reason}.*no counterpart in saelens"):
            export(sae, tmp_path / "out", "saelens")
    assert list(tmp_path.iterdir()) == []


def tied(d: int = 4) -> SAE:
    """Latents 0 and 1 read opposite directions and write different ones: they tie on every token."""
    sae = build("abs_topk", d, 2 * d, k=1).eval()
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_enc[:, 2:] = 0
        sae.W_enc[:, 0], sae.W_enc[:, 1] = -torch.ones(d), torch.ones(d)
    return sae


def test_a_tie_at_rank_k_does_not_fail_a_right_export(tmp_path: Path) -> None:
    sae, x = tied(), torch.rand(20, 4) + 0.5
    export(sae, tmp_path / "out", "sparsify", probe=x)
    theirs = load(tmp_path / "out", is_sae=True)
    code = theirs.encode(x).dense()
    ours = sae.encode(x).dense()
    assert not torch.equal(ours != 0, (code[:, :8] - code[:, 8:]) != 0), "the tie is decided otherwise there"
    assert max(prove(sae, theirs, x)) < 1e-6


def test_a_tie_excuses_neither_another_value_nor_another_decoder_nor_another_k(tmp_path: Path) -> None:
    sae, x = tied(), torch.rand(20, 4) + 0.5
    export(sae, tmp_path / "out", "sparsify", probe=x)
    for change in ("W_dec", "b_enc", "k"):
        theirs = load(tmp_path / "out", is_sae=True)
        with torch.no_grad():
            if change == "W_dec":
                theirs.W_dec[1] *= 1.01  # the row that is chosen there
            elif change == "b_enc":
                theirs.b_enc[1] += 0.01
            else:
                theirs.k = 2
        assert max(prove(sae, theirs, x)) > 1e-3, change


def test_a_value_on_its_threshold_does_not_fail_a_right_export() -> None:
    sae, theirs = example("jump_relu"), example("jump_relu")
    x = torch.randn(30, D_IN)
    with torch.no_grad():
        pre_acts = sae.pre_acts(x, slice(0, D_SAE))[0]
        latent = int(pre_acts.argmax())
        on_edge = pre_acts[latent]
        sae.threshold[latent], theirs.threshold[latent] = on_edge - 1e-6, on_edge + 1e-6
        assert on_edge > 0 and (sae.encode(x).dense() != theirs.encode(x).dense()).any()
        assert max(prove(sae, theirs, x)) < 1e-4
        theirs.threshold[latent] = 1.1 * on_edge + 0.1
        sae.threshold[latent] = on_edge - 1e-2
    assert max(prove(sae, theirs, x)) > 1e-4


def test_inspect_points_at_oddities(tmp_path: Path) -> None:
    sae = example("topk")
    with torch.no_grad():
        sae.W_dec.mul_(2)
        sae.W_enc[:, 3] = 0
    save(sae, tmp_path / "run", {})
    facts = inspect(tmp_path / "run")
    assert (facts["d_in"], facts["d_sae"], facts["dead_estimate"]) == (D_IN, D_SAE, 1)
    assert facts["notes"] == [
        "decoder rows are not of unit norm",
        "the hook point is not recorded",
        "1 latents are dead by collapsed encoders",
    ]


def by_hand(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """SAELens' two files as somebody writes them."""
    metadata = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post", **dict(config.pop("metadata", {}))}  # pyright: ignore
    whole = {"architecture": "topk", "k": 4, "d_in": D_IN, "d_sae": D_SAE, "metadata": metadata, **config}
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in whole.items() if value != "none here"}))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def four() -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in example("topk").named_parameters()}


@pytest.mark.parametrize("name", ["apply_b_dec_to_input", "rescale_acts_by_decoder_norm"])
def test_a_setting_written_as_text_is_not_taken_for_true(name: str, tmp_path: Path) -> None:
    refused(by_hand(tmp_path, four(), **{name: "false"}), f"{name}='false' is neither true nor false")


@pytest.mark.parametrize("metadata", [{"prepend_bos": "no"}, {"hook_name": 3}, {"model_name": ["gpt2"]}])
def test_metadata_of_another_kind(metadata: dict[str, object], tmp_path: Path) -> None:
    refused(by_hand(tmp_path, four(), metadata=metadata), "neither true nor false|is no text")


def test_an_saelens_folder_written_by_hand(tmp_path: Path) -> None:
    by_hand(tmp_path, four(), metadata={"prepend_bos": None})
    assert not [note for note in inspect(tmp_path)["notes"] if "flat layout" in note]
    refused(by_hand(tmp_path, four(), architecture="none here"), "k and no architecture")


def test_a_threshold_below_zero_lets_nothing_negative_through(tmp_path: Path) -> None:
    tensors = {**four(), "threshold": torch.linspace(-1, 1, D_SAE)}
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    expected = pre.relu() * (pre > tensors["threshold"])
    sae = load(by_hand(tmp_path, tensors, architecture="jumprelu"))
    assert (sae.encode(x).dense() - expected).abs().max() < 1e-5
    gemma = tmp_path / "params.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, gemma)
    (tmp_path / "cfg.json").unlink()
    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    expected = pre.relu() * (pre > tensors["threshold"])
    assert (load(gemma, is_sae=True).encode(x).dense() - expected).abs().max() < 1e-5
    torch.save(tensors, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "JumpReluAutoEncoder"}}))
    assert (load(tmp_path / "ae.pt").encode(x).dense() - expected).abs().max() < 1e-5
