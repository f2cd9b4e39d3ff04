"""Steering with SAEs of other tools: opened as they are, and given away in recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saelab import ActivationCache
from saelab.cli import main
from saelab.errors import UserError
from saelab.files import write_json
from saelab.interop import load
from saelab.runs import as_run
from saelab.sae import Normalised
from saelab.sae.weights import load_sae, save
from saelab.steering import Add, Clamp, Recipe, Run, SteeringVector
from tests.steering.models import D_MODEL, HOOK, bridge, folder, llama
from tests.steering.test_steering import plain

D_SAE, K = 64, 8


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(D_SAE, D_MODEL, generator=generator)
    return {"W_dec": W_dec / W_dec.norm(dim=1, keepdim=True), "b": 0.1 * torch.randn(D_SAE, generator=generator)}


@pytest.fixture
def sparsify(tmp_path: Path) -> Path:
    """A folder as sparsify writes it: named after the hook point, counted from the base model."""
    path = tmp_path / "layers.1"
    path.mkdir()
    w = weights()
    tensors = {"encoder.weight": w["W_dec"].clone(), "encoder.bias": w["b"], "W_dec": w["W_dec"]}
    save_file(tensors | {"b_dec": torch.zeros(D_MODEL)}, path / "sae.safetensors")
    write_json(path / "cfg.json", {"activation": "topk", "num_latents": 0, "k": K, "d_in": D_MODEL})
    return path


@pytest.fixture
def openai(tmp_path: Path) -> Path:
    """A file as OpenAI wrote it: reads layer-normed activations, and says nowhere which."""
    w = weights()
    state = {
        "encoder.weight": w["W_dec"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "latent_bias": w["b"],
        "pre_bias": torch.zeros(D_MODEL),
        "activation": "TopK",
        "activation_state_dict": {"k": K},
    }
    torch.save(state, tmp_path / "autoencoder.pt")
    return tmp_path / "autoencoder.pt"


def test_an_sae_of_another_tool_steers_where_its_folder_says(sparsify: Path) -> None:
    run = Run.open(sparsify)
    assert (run.hook_name, run.index, run.rms_norm) == ("layers.1", None, None)
    made = [Clamp(run, 3, 9.0), Add(SteeringVector.from_latent(sparsify, 5), 6.0)]
    ours = Run(load(sparsify), HOOK)
    expected = plain(llama(), interventions=[Clamp(ours, 3, 9.0), Add(SteeringVector.from_latent(ours, 5), 6.0)])
    assert expected != plain(llama())
    assert plain(llama(), interventions=made) == expected
    assert plain(bridge(), interventions=made) == expected


def test_a_hook_name_given_wins(sparsify: Path, openai: Path) -> None:
    assert Run.open(sparsify, "blocks.2.hook_resid_pre").hook_name == "blocks.2.hook_resid_pre"
    with pytest.raises(UserError, match=r"autoencoder\.pt does not record its hook point; give hook_name"):
        as_run(openai)


def test_a_recipe_may_hold_a_layer_normed_sae(openai: Path, tmp_path: Path) -> None:
    run = Run.open(openai, HOOK)
    assert isinstance(run.sae, Normalised)
    made = [Clamp(run, 3, 9.0), Clamp(run, 7, 5.0)]
    expected = plain(llama(), interventions=made)
    assert expected != plain(llama())
    Recipe.of(llama(), made).save(tmp_path / "recipe")
    with Recipe.load(tmp_path / "recipe").attach(bridge()) as _:
        assert plain(bridge()) == expected


def test_a_layer_normed_sae_survives_its_own_folder(openai: Path, tmp_path: Path) -> None:
    sae, x = load(openai), torch.randn(20, D_MODEL)
    save(sae, tmp_path / "again")
    for again in (load_sae(tmp_path / "again"), load(tmp_path / "again")):
        assert torch.equal(again.encode(x).dense(), sae.encode(x).dense())
        assert torch.equal(again(x), sae(x))


def test_units_that_are_not_known_are_refused_with_the_remedy(sparsify: Path) -> None:
    vector = SteeringVector.from_latent(sparsify, 3)
    with pytest.raises(UserError, match="which this vector does not know; give an absolute strength"):
        Add(vector, "0.5norm")
    with pytest.raises(UserError, match="has no feature index; build it with `saelab index"):
        Add(vector, "0.5max")


def test_an_index_gives_it_the_units(sparsify: Path) -> None:
    cache = sparsify.parent / "cache"
    ActivationCache.from_tensors(cache, torch.randn(300, D_MODEL), torch.randint(4, 90, (300,)), context_length=20)
    main(["index", str(sparsify), "--cache", str(cache), "--model", "none"])
    run = Run.open(sparsify)
    assert run.index is not None
    assert Add(SteeringVector.from_latent(run, 3), "0.5max").length == pytest.approx(0.5 * run.index.max_activation(3))


def test_it_is_evaluated_where_it_lies(sparsify: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = sparsify.parent / "cache"
    ActivationCache.from_tensors(cache, torch.randn(300, D_MODEL), torch.randint(4, 90, (300,)), context_length=20)
    main(["evaluate", str(sparsify), "--cache", str(cache), "--lm-tokens", "0", "--json"])
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert 0 < found["l0"]["value"] <= K
    assert json.loads((sparsify / "evaluation.json").read_text())["metrics"] == found


def test_a_file_has_no_room_for_an_index(openai: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = openai.parent / "cache"
    ActivationCache.from_tensors(cache, torch.randn(30, D_MODEL))
    with pytest.raises(SystemExit):
        main(["index", str(openai), "--cache", str(cache)])
    assert "name a new one with --out" in capsys.readouterr().err


def test_the_command_line_takes_them_too(sparsify: Path, openai: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--latent", "3", "--strength", "9", "--model", folder(), "--prompt", "w5 w6", "--max-new-tokens", "4"]
    main(["steer", str(sparsify), *args])
    first = capsys.readouterr().out
    assert "steered" in first
    for wrong, message in (
        ([str(openai), *args], "--hook"),
        ([str(sparsify.parent), *args], "is in no SAE format known here"),
        ([str(sparsify / "nothing"), *args], "does not exist"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["steer", *wrong])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error.replace("\n", " ") and "Traceback" not in error
    main(["steer", str(openai), "--hook", HOOK, *args])
    assert "steered" in capsys.readouterr().out
