"""Transcoders and crosscoders of every tool are told from SAEs and refused in one line that says how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.interop import load, read
from saelab.runs import Run
from saelab.sae import build
from saelab.training import TrainConfig, train
from tests.interop import collected
from tests.interop.collected import D_IN, D_SAE, put, weights

IN, OUT = "blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out"
HF_IN, HF_OUT = (f"model.layers.8.{name}_feedforward_layernorm.output" for name in ("pre", "post"))


def gemma_2(root: Path) -> Path:
    return collected.gemma_scope_2(root / "layer_8_width_16k_l0_big", HF_IN, HF_OUT, type="transcoder")


def gemma_2_crosscoder(root: Path) -> Path:
    folder = collected.gemma_scope_2(root / "layer_2_5", "model.layers.2.output")
    w = {"w_enc": torch.randn(3, D_IN, D_SAE), "w_dec": torch.randn(3, D_SAE, D_IN)}
    put(folder / "params.safetensors", {**w, "b_enc": torch.zeros(D_SAE), "b_dec": torch.zeros(3, D_IN)})
    return folder


def llama_without_its_output(root: Path) -> Path:
    return collected.llama_scope(root / "Llama3_1-8B-Base-L8TC-8x", IN, "")


def llamascopium_crosscoder(root: Path) -> Path:
    return collected.llamascopium(root / "cc", IN, IN, sae_type="crosscoder")


def saelens_that_calls_itself_standard(root: Path) -> Path:
    return collected.saelens(root / "sae", "standard", IN, metadata={"hook_name_out": OUT})


def saelens_skip(root: Path) -> Path:
    return collected.saelens(root / "sae", "standard", tensors={"W_skip": torch.eye(D_IN)})


def saelens_of_another_width(root: Path) -> Path:
    return collected.saelens(root / "sae", "standard", tensors=weights(d_out=24))


def saelens_flat(root: Path) -> Path:
    return collected.saelens_flat(root / "sae", is_transcoder=True)


def dictionary_learning(root: Path) -> Path:
    return collected.dictionary_learning(root / "trainer_0", io="in_and_out")


def dictionary_learning_crosscoder(root: Path) -> Path:
    return collected.dictionary_learning(root / "trainer_0", dict_class="BatchTopKCrossCoder")


def goodfire(root: Path) -> Path:
    path = root / "model.pth"
    wide = {name.replace(".", "_linear."): v for name, v in collected.linear(weights(d_out=24)).items()}
    put(path, wide)
    return path


def qwen(root: Path) -> Path:
    return collected.qwen_scope(root / "Transcoder-Qwen3-1.7B-W32K-L0_4")


def openai(root: Path) -> Path:
    return collected.openai(root / "skip_transcoders" / "0.pt")


def overcomplete(root: Path) -> Path:
    return collected.overcomplete(root / "clt" / "layer_0.pt")


CASES = {
    gemma_2_crosscoder: r"crosscoder.*serves several layers \(3 x 40 x 16\)",
    llama_without_its_output: "transcoder.*by the name 'Llama3_1-8B-Base-L8TC-8x'",
    llamascopium_crosscoder: "crosscoder.*sae_type='crosscoder'",
    saelens_that_calls_itself_standard: "transcoder.*reads .* and writes blocks.8.hook_mlp_out",
    saelens_skip: "transcoder.*skip connection, W_skip",
    saelens_of_another_width: "transcoder.*reads activations of width 16 and writes width 24",
    saelens_flat: "transcoder.*is_transcoder=true",
    dictionary_learning: "transcoder.*io=in_and_out",
    dictionary_learning_crosscoder: "crosscoder.*dict_class='BatchTopKCrossCoder'",
    goodfire: "transcoder.*width 16 and writes width 24",
    qwen: "transcoder.*by the name 'Transcoder-Qwen3",
    openai: "transcoder.*by the name 'skip_transcoders'",
    overcomplete: "cross-layer transcoder.*by the name 'clt'",
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_what_writes_elsewhere_is_refused(make: collected.Maker, tmp_path: Path) -> None:
    path = make(tmp_path / "files")
    for opened in (load, lambda path: Run.open(path).sae):
        with pytest.raises(UserError, match=CASES[make]) as error:
            opened(path)
        assert "\n" not in str(error.value) and "not an SAE" in str(error.value)


def circuit_tracer(root: Path) -> Path:
    folder = root / "set"
    put(folder / "layer_1.safetensors", weights())
    put(folder / "layer_0.safetensors", {**weights(), "W_enc": weights()["W_enc"].T})
    (folder / "config.yaml").write_text("feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n")
    return folder


def circuit_tracer_by_name(root: Path) -> Path:
    put(root / "qwen3-4b-transcoders" / "layer_0.safetensors", weights())
    return root / "qwen3-4b-transcoders" / "layer_0.safetensors"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (circuit_tracer, "is a set of circuit-tracer's transcoders; name one"),
        (circuit_tracer_by_name, "is a transcoder, not an SAE.*'qwen3-4b-transcoders'"),
    ],
)
def test_what_is_in_no_format_is_called_by_its_name(make: collected.Maker, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match) as error:
        load(make(tmp_path / "files"))
    assert "\n" not in str(error.value)


def test_unrelated_directions_are_refused_where_nothing_speaks_for_an_sae(tmp_path: Path) -> None:
    """Gemma Scope's transcoder in a folder whose name says nothing: only its directions give it away."""
    torch.manual_seed(0)
    wide = {"W_enc": torch.randn(64, 400), "W_dec": torch.randn(400, 64), "b_enc": torch.zeros(400)}
    more = {"b_dec": torch.zeros(64), "threshold": torch.full((400,), 0.1)}
    put(tmp_path / "a" / "params.npz", {**wide, **more})
    put(tmp_path / "against" / "params.npz", {**wide, **more, "W_enc": -0.1 * wide["W_dec"].T + 0.5 * wide["W_enc"]})
    with pytest.raises(UserError, match=r"may be a transcoder.*opposed"):
        load(tmp_path / "against")
    put(tmp_path / "b" / "params.npz", {**wide, **more, "W_enc": wide["W_dec"].T + 2 * wide["W_enc"]})
    with pytest.raises(UserError, match="may be a transcoder: neither its files nor its name"):
        load(tmp_path / "a")
    assert any("as a transcoder's are" in note for note in read(tmp_path / "a", is_sae=True).notes)
    assert not read(tmp_path / "b").notes
    main(["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "saelab", "--is-sae"])
    assert any("as a transcoder's are" in note for note in Run.open(tmp_path / "c").notes)
    named = tmp_path / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_59"
    put(named / "params.npz", {**wide, **more})
    assert any("as a transcoder's are" in note for note in read(named).notes)


@pytest.mark.parametrize("belongs", [True, False])
def test_a_reconstruction_worse_than_the_mean_is_remarked(
    belongs: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An SAE of another place, on activations that it was not trained on; a trained one is passed over in silence."""
    acts = torch.randn(4096, D_IN, generator=torch.Generator().manual_seed(0)) + 3
    cache, path = ActivationCache.from_tensors(tmp_path / "cache", acts, context_length=64), tmp_path / "run"
    if belongs:
        train(build("topk", D_IN, 64, k=8), cache, TrainConfig(epochs=3, batch_size=256, lr=3e-3), path)
    else:
        collected.saelens(path)
    for command in (["evaluate", "--lm-tokens", "0"], ["index", "--model", "none"], ["inspect"]):
        capsys.readouterr()
        main([command[0], str(path), "--cache", str(cache.path), *command[1:]])
        said = " ".join("".join(capsys.readouterr()).split())
        assert ("further from these activations than their mean" in said) is not belongs, said


def test_folders_far_above_do_not_count(tmp_path: Path) -> None:
    far = tmp_path / "transcoders" / "a" / "b" / "c" / "d" / "e"
    assert load(collected.goodfire(far / "model.pth")).d_sae == D_SAE


def test_a_file_that_says_it_is_an_sae_is_believed(tmp_path: Path) -> None:
    folder = tmp_path / "my-transcoders"
    assert load(collected.saelens(folder / "one")).d_sae == D_SAE
    assert load(collected.llama_scope(folder / "two", OUT, OUT)).d_sae == D_SAE
    assert load(collected.sparsify(folder / "three")).d_sae == D_SAE


def test_tensors_that_nothing_is_known_of_are_named(tmp_path: Path) -> None:
    folder = collected.saelens(tmp_path / "a", tensors={"mystery": torch.ones(3), "threshold": torch.ones(D_SAE)})
    assert [note for note in read(folder).notes if "mystery" in note and "threshold" not in note]
