"""Recipes: what is saved is what is applied, to the model it was made for and to no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import LlamaConfig, LlamaForCausalLM

from saelab.errors import UserError
from saelab.sae.weights import save
from saelab.steering import Ablate, Add, Clamp, MinClamp, ProjectOut, Recipe, Run, Scale, SteeringVector
from saelab.steering.recipe import export_gguf
from tests.steering.models import bridge, llama
from tests.steering.test_steering import HOOK, IDS, MASK, NEW, RUN, plain, vector

PARTS = {
    "add": [Add(vector(), 9.0, where="generated"), Add(vector(1, "blocks.0.hook_mlp_out"), "0.5raw", where=[1, -1])],
    "project": [ProjectOut([vector(i) for i in range(6)], strength=0.9)],
    "latents": [Clamp(RUN, 11, 7.0), Scale(RUN, 3, 8.0, pole=1, where="prompt"), Ablate(RUN, 5), MinClamp(RUN, 7, 3.0)],
}


@pytest.mark.parametrize("name", PARTS)
def test_a_saved_recipe_steers_alike_in_both_kinds_of_model(name: str, tmp_path: Path) -> None:
    expected = plain(llama(), interventions=PARTS[name])
    assert expected != plain(llama())
    Recipe.of(bridge(), PARTS[name], name=name, provenance={"why": "test"}).save(tmp_path / "recipe")
    recipe = Recipe.load(tmp_path / "recipe")
    assert (recipe.name, recipe.provenance) == (name, {"why": "test"})
    for model in (llama(), bridge()):
        with recipe.attach(model):
            assert plain(model) == expected
    with recipe.attach(llama()):
        out = llama().generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert out[:, IDS.shape[1] :].tolist() == expected


def test_units_survive_without_the_index(tmp_path: Path) -> None:
    class Index:
        poles = (1,)

        def max_activation(self, latent: int, pole: int = 1) -> float:
            return 10.0

    run = Run(RUN.sae, HOOK, rms_norm=3.0)
    run.__dict__["index"] = Index()
    made = [Add(SteeringVector.from_latent(run, 3), "0.8max"), Add(vector(), 1.0), Clamp(run, 5, "0.5max")]
    Recipe.of(llama(), made).save(tmp_path / "recipe")
    loaded = Recipe.load(tmp_path / "recipe").interventions
    norm = float(RUN.sae.W_dec[3].detach().norm())
    assert loaded[0].length == pytest.approx(8 * norm)
    assert loaded[0].vector.length("1norm") == 3.0
    assert loaded[2].target == 5.0


def test_the_content_of_a_recipe_is_that_of_0_1_0(tmp_path: Path) -> None:
    """A recipe is read by other versions: what each operation writes, key by key."""
    made = [
        Add(vector(), "0.5raw", where=[1, -1]),
        ProjectOut([vector(0), vector(1)], strength=0.9),
        Scale(RUN, 3, 8.0, pole=1, where="prompt"),
        Clamp(RUN, 11, 7.0),
        MinClamp(RUN, 7, 3.0, keep_error=True, skip_first=False),
        Ablate(RUN, 5),
    ]
    Recipe.of(llama(), made).save(tmp_path / "recipe")
    entries = json.loads((tmp_path / "recipe" / "recipe.json").read_text())["interventions"]
    at, sha = {"hook_name": HOOK, "skip_first": True}, RUN.fingerprint
    sae = {"keep_error": True, "sae": "sae_0", "sae_sha256": sha, "source": {"run": None, "sae_sha256": sha}}
    about = {"hook_name": HOOK, "model": None, "max_activation": None, "rms_norm": None, "origin": {"kind": "tensor"}}
    vectors = [{"tensor": f"vector_{i}", "norm": pytest.approx(6.0), **about} for i in range(3)]
    add = {"op": "Add", "where": [1, -1], "strength": "0.5raw", "length": pytest.approx(3.0)}
    assert entries == [
        {**at, **add, "skip_first": False, "vectors": vectors[:1]},
        {**at, "op": "ProjectOut", "where": "all", "skip_first": False, "strength": 0.9, "vectors": vectors[1:]},
        {**at, "op": "Scale", "where": "prompt", "latent": 3, "pole": 1, "factor": 8.0, **sae},
        {**at, "op": "Clamp", "where": "all", "latent": 11, "pole": 0, "value": 7.0, "given": 7.0, **sae},
        {**at, "op": "MinClamp", "where": "all", "latent": 7, "pole": 0, "value": 3.0, "given": 3.0, **sae}
        | {"skip_first": False},
        {**at, "op": "Ablate", "where": "all", "latent": 5, "pole": 0, **sae},
    ]


def test_a_loaded_vector_still_says_why_it_has_no_maximum(tmp_path: Path) -> None:
    save(RUN.sae, tmp_path / "run", {"hook_name": HOOK})
    run = Run.open(tmp_path / "run")
    made = 2 * SteeringVector.from_latent(run, 3, "-")
    Recipe.of(llama(), Add(made, 1.0)).save(tmp_path / "recipe")
    (loaded,) = Recipe.load(tmp_path / "recipe").interventions
    with pytest.raises(UserError, match=r"run had no feature index when .* its latent 3 never fires on its - pole"):
        loaded.vector.length("1max")
    with pytest.raises(UserError, match=r"run has no feature index; build it with `saelab index"):
        made.length("1max")
    with pytest.raises(UserError, match="only a single latent has a maximum"):
        (loaded.vector + vector()).length("1max")
    index = tmp_path / "run" / "features" / "features.parquet"
    index.parent.mkdir()
    index.write_bytes(b"")
    with pytest.raises(UserError, match="latent 3 never fires on its - pole in the feature index"):
        made.length("1max")


def other_model(**changes) -> LlamaForCausalLM:
    torch.manual_seed(9)
    return LlamaForCausalLM(LlamaConfig(**{**llama().config.to_dict(), **changes})).eval()


def test_another_model_is_refused() -> None:
    recipe = Recipe.of(llama(), PARTS["add"])
    with pytest.raises(UserError, match="other weights"), recipe.attach(other_model()):
        pass
    with recipe.attach(other_model(), any_weights=True):
        pass
    for changes, message in (
        ({"hidden_size": 64, "head_dim": 16}, "d_model 32"),
        ({"num_hidden_layers": 2}, "n_layers 3"),
    ):
        with pytest.raises(UserError, match=message), recipe.attach(other_model(**changes), any_weights=True):
            pass


def test_damage_and_strangers_are_named(tmp_path: Path) -> None:
    folder = Recipe.of(llama(), PARTS["add"]).save(tmp_path / "recipe")
    with pytest.raises(UserError, match="exists; replace it with overwrite"):
        Recipe.of(llama(), PARTS["add"]).save(folder)
    Recipe.of(llama(), PARTS["project"]).save(folder, overwrite=True)
    assert len(Recipe.load(folder).interventions) == 1
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is not a recipe and will not be replaced"):
        Recipe.of(llama(), PARTS["add"]).save(tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "recipe"]
    content = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(content | {"vectors_sha256": "0" * 64}))
    with pytest.raises(UserError, match="does not match the hash"):
        Recipe.load(folder)
    (folder / "recipe.json").write_text(json.dumps(content | {"version": 9}))
    with pytest.raises(UserError, match="version 9; this saelab reads"):
        Recipe.load(folder)
    with pytest.raises(UserError, match=r"has no recipe\.json"):
        Recipe.load(tmp_path / "mine")
    with pytest.raises(UserError, match="predicate"):
        Recipe.of(llama(), Add(vector(), 1.0, where=lambda c: c.generated)).save(tmp_path / "predicate")
    assert not (tmp_path / "predicate").exists()


def test_a_changed_sae_is_noticed(tmp_path: Path) -> None:
    folder = Recipe.of(llama(), PARTS["latents"]).save(tmp_path / "recipe")
    content = json.loads((folder / "recipe.json").read_text())
    content["interventions"][0]["sae_sha256"] = "0" * 64
    (folder / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="sae_0 does not match the hash"):
        Recipe.load(folder)


def test_gguf_holds_the_sum_of_the_vectors_at_their_layer(tmp_path: Path) -> None:
    recipe = Recipe.of(llama(), [Add(vector(0), 2.0), Add(vector(1), -3.0), Add(vector(2, "model.layers.2"), "1raw")])
    reader = GGUFReader(export_gguf(recipe, tmp_path / "vector.gguf"))
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    expected = 2 * vector(0).direction - 3 * vector(1).direction
    assert set(tensors) == {"direction.1", "direction.2"}
    torch.testing.assert_close(tensors["direction.1"], expected)
    torch.testing.assert_close(tensors["direction.2"], vector(2).vector)


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        ([Ablate(RUN, 3)], "can only add; Ablate"),
        ([Add(vector(), 1.0, where="prompt")], "acts on every token"),
        ([Add(vector(hook="blocks.0.hook_resid_post"), 1.0)], "no slot for block 0"),
        ([Add(vector(hook="blocks.1.hook_mlp_out"), 1.0)], "acts on a block's output"),
        ([], "no vector"),
    ],
)
def test_what_gguf_cannot_say_is_refused(interventions, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export_gguf(Recipe.of(llama(), interventions), tmp_path / "vector.gguf")
    assert list(tmp_path.iterdir()) == []
