"""Graphs as objects and files: what is kept, bad input, viewers, steering from a graph, other kinds of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.attribution import AttributeConfig, AttributionGraph, attribute, read_graph, write_graph
from saelab.attribution.graph import Node, PlaceSummary
from saelab.errors import UserError
from saelab.runs import Run
from saelab.steering import Ablate, Recipe, generate
from tests.attribution import tiny
from tests.steering.models import HOOK, bridge, llama, tokenizer


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    return attribute(tiny.runs(0, 1, variant="abs_topk"), tiny.PROMPT, model=tiny.model("gpt2"))


def refused(words: str, *args: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        attribute(*args, **options)
    assert "\n" not in str(caught.value)


def test_the_share_that_was_asked_for_is_kept_and_said() -> None:
    model, runs = tiny.model("gpt2"), tiny.runs(0, 1)
    for keep in (0.3, 0.9):
        found = attribute(runs, tiny.PROMPT, model=model, keep=keep, check=0)
        assert all(place.kept_share >= keep for place in found.places) and not found.notes
    few = attribute(runs, tiny.PROMPT, model=model, max_nodes=4, check=0)
    assert [place.kept for place in few.places] == [2, 2]
    assert "the most nodes, 4, keep" in few.notes[0] and all(place.kept_share < 0.8 for place in few.places)
    one = attribute(runs, tiny.PROMPT, model=model, max_nodes=1, check=0)  # fewer than places
    (kept,) = [node for node in one.nodes if node.kind in ("latent", "error")]
    assert sum(place.kept for place in one.places) == 1
    assert kept.id == next(node.id for node in few.nodes if node.kind in ("latent", "error"))


def test_a_bridge_and_the_plain_model_give_the_same_graph() -> None:
    sae = tiny.sae("abs_topk", dtype=torch.float32)
    plain = attribute(Run(sae, HOOK), "w4 w9 w17 w30", model=llama(), tokenizer=tokenizer())
    other = attribute(Run(sae, HOOK), "w4 w9 w17 w30", model=bridge())
    assert other.value == pytest.approx(plain.value, abs=1e-4)
    assert [n.id for n in other.nodes[:10]] == [n.id for n in plain.nodes[:10]]
    for a, b in zip(other.nodes, plain.nodes):
        assert a.effect == pytest.approx(b.effect, abs=1e-4)
    # With a hook on the bridge, the bridge itself runs.
    with bridge().hooks(fwd_hooks=[("blocks.0.hook_out", lambda x, hook: 2 * x)]):
        scaled = attribute(Run(sae, HOOK), "w4 w9 w17 w30", model=bridge(), mode="gradient", check=0)
    assert scaled.value != pytest.approx(plain.value, abs=1e-3)


def test_half_precision_says_how_far_the_parts_are_from_the_whole() -> None:
    found = attribute(
        tiny.runs(1, dtype=torch.float32), tiny.PROMPT, model=tiny.model("llama", torch.bfloat16), check=0
    )
    assert found.drift < 0.1 and abs(found.value) > 0


def test_targets() -> None:
    model, runs = tiny.model("gpt2"), tiny.runs(1)
    likeliest = attribute(runs, tiny.PROMPT, model=model, check=0)
    logits = model(input_ids=torch.tensor([likeliest.token_ids])).logits[0, -1].detach()
    assert likeliest.target_token == int(logits.argmax())
    assert likeliest.probability == pytest.approx(float(logits.softmax(0).max()), rel=1e-5)
    token = model.tokenizer.encode(" rain", add_special_tokens=False)
    named = attribute(runs, tiny.PROMPT, " rain", model=model, check=0)
    assert named.target_token == token[0]
    against = attribute(runs, tiny.PROMPT, " rain", against=" old", model=model, check=0)
    other = model.tokenizer.encode(" old", add_special_tokens=False)[0]
    assert against.value == pytest.approx(float(logits[token[0]] - logits[other]))
    logprob = attribute(runs, tiny.PROMPT, " rain", of="logprob", model=model, check=0)
    assert logprob.value == pytest.approx(float(logits.log_softmax(0)[token[0]]))
    several = attribute(runs, tiny.PROMPT, " xyzzy", model=model, check=0)
    assert any("tokens; the first" in note for note in several.notes)


def test_bad_input_is_refused_in_one_line() -> None:
    model, runs = tiny.model("gpt2"), tiny.runs(1)
    refused("at least one SAE", [], tiny.PROMPT, model=model)
    refused("prompt is empty", runs, "", model=model)
    refused("target is empty", runs, tiny.PROMPT, "", model=model)
    refused("same token", runs, tiny.PROMPT, " rain", against=" rain", model=model)
    refused("outside the vocabulary", runs, tiny.PROMPT, 10**6, model=model)
    refused("two SAEs explain", [*tiny.runs(1), *tiny.runs(1)], tiny.PROMPT, model=model)
    refused("no hook point", [Run(tiny.sae(), "blocks.1.hook_nothing")], tiny.PROMPT, model=model)
    refused("cannot be replaced", [Run(tiny.sae(), "blocks.1.hook_resid_mid")], tiny.PROMPT, model=model)
    refused("belongs to another model", [Run(tiny.sae(), "blocks.1.mlp.hook_post")], tiny.PROMPT, model=model)
    refused("longer than the 64 positions", runs, "the cat " * 60, model=model)
    refused("keep=1.5", runs, tiny.PROMPT, model=model, keep=1.5)
    refused("first 99 are left whole", runs, tiny.PROMPT, model=model, skip_first=99)
    refused(
        "contains the next token",
        [Run(tiny.sae("gradient_topk", grad_select="train_and_eval"), HOOK)],
        "a b",
        model=model,
    )


def test_viewers_find_what_their_schema_requires(graph: AttributionGraph, tmp_path: Path) -> None:
    """circuit-tracer's models and Neuronpedia's schema of a graph, as far as they require something."""
    path = write_graph(graph, tmp_path / "my-graph.json")
    content = json.loads(path.read_text())
    metadata = content["metadata"]
    assert metadata["slug"] == "my-graph" and metadata["prompt_tokens"] == graph.tokens
    assert isinstance(metadata["scan"], str) and metadata["transcoder_list"] == [] and metadata["schema_version"] == 1
    assert set(content["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    kinds = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    names = [node["node_id"] for node in content["nodes"]]
    assert len(set(names)) == len(names)
    assert len({node["jsNodeId"] + str(node["ctx_idx"]) for node in content["nodes"]}) == len(names)
    for node in content["nodes"]:
        wanted = {"node_id": str, "layer": str, "ctx_idx": int, "feature_type": str, "jsNodeId": str, "clerp": str}
        assert all(isinstance(node[key], kind) for key, kind in wanted.items()) and isinstance(node["feature"], int)
        assert node["feature_type"] in kinds and node["layer"] == node["node_id"].split("_")[0]
        assert node["influence"] is None or 0 <= node["influence"] <= 1
    for link in content["links"]:
        assert {link["source"], link["target"]} <= set(names) and isinstance(link["weight"], float)
    (logit,) = [node for node in content["nodes"] if node["is_target_logit"]]
    assert int(logit["layer"]) > max(place.layer for place in graph.places)
    latent = next(node for node in content["nodes"] if node["feature_type"] == "cross layer transcoder")
    layer, number = (int(part) for part in latent["node_id"].split("_")[:2])
    assert latent["feature"] == (layer + number) * (layer + number + 1) // 2 + number
    # The list of a folder, which the server reads first, has each graph once.
    write_graph(graph, tmp_path / "other.json")
    write_graph(graph, tmp_path / "my-graph.json")
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert sorted(entry["slug"] for entry in listed) == ["my-graph", "other"] and "saelab" not in listed[0]


def test_a_graph_is_read_back_whole(graph: AttributionGraph, tmp_path: Path) -> None:
    found = read_graph(write_graph(graph, tmp_path / "graph.json"))
    assert found == graph or {**vars(found), "runs": 0} == {**vars(graph), "runs": 0}
    with pytest.raises(UserError, match="read without its runs"):
        found.interventions([found.latents[0]])
    found.attach_runs(graph.runs)
    assert found.interventions([found.latents[0]])
    (tmp_path / "foreign.json").write_text('{"metadata": {"slug": "a"}}')
    (tmp_path / "broken.json").write_text("{")
    for name, words in (("foreign.json", "not a graph of saelab"), ("broken.json", "damaged"), ("no.json", "no file")):
        with pytest.raises(UserError, match=words):
            read_graph(tmp_path / name)
    with pytest.raises(UserError, match=r"end in \.json"):
        write_graph(graph, tmp_path / "graph.txt")


def test_latents_of_a_graph_become_a_recipe(tmp_path: Path) -> None:
    run = Run(tiny.sae("abs_topk", dtype=torch.float32), HOOK)
    found = attribute(run, "w4 w9 w17 w30", model=llama(), tokenizer=tokenizer())
    ablations = found.interventions(found.latents[:3])
    assert all(isinstance(step, Ablate) and step.where == "all" for step in ablations)
    assert {(step.latent, step.pole) for step in ablations} == {(n.latent, n.pole) for n in found.latents[:3]}
    placed = found.interventions([found.latents[0].id], at_positions=True)
    assert list(placed[0].where) == [found.latents[0].position]
    Recipe.of(llama(), ablations, name="from a graph").save(tmp_path / "recipe")
    with Recipe.load(tmp_path / "recipe").attach(llama()):
        text = generate(llama(), "w4 w9 w17 w30", tokenizer=tokenizer(), max_new_tokens=4)
    assert text == generate(llama(), "w4 w9 w17 w30", ablations, tokenizer=tokenizer(), max_new_tokens=4)
    for chosen, words in (
        ([next(n for n in found.nodes if n.kind == "embedding")], "is a token, not a latent"),
        (["9_9_9"], "has no node"),
        ([], "no latent was chosen"),
    ):
        with pytest.raises(UserError, match=words):
            found.interventions(chosen)
    with pytest.raises(UserError, match="unknown operation"):
        found.interventions(found.latents[:1], "delete")


def test_settings_are_checked_before_anything_runs() -> None:
    for wrong in ({"keep": 0.0}, {"max_nodes": 0}, {"check": -1}, {"mode": "other"}):
        with pytest.raises(UserError):
            AttributeConfig(**wrong)
    assert Node("1_2_3", "latent", 1, 3, 0.0, 0.0, 2, -1.0).pole == -1


def test_what_the_index_knows_goes_to_the_viewer(tmp_path: Path) -> None:
    """One file per latent, with the fields of circuit-tracer's model of a feature."""
    from saelab.shipped import checkpoints

    run = Run.open(checkpoints() / "abs_topk")
    nodes = [Node("9_7_1", "latent", 9, 1, 1.0, 1.0, 7, -2.0), Node("9_8_1", "latent", 9, 1, 1.0, 1.0, 8, 2.0)]
    assert run.index is not None
    place = PlaceSummary("blocks.9.hook_resid_post", 9, "", "", 2, 2, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    about = {"prompt": "p", "tokens": ["a", "b"], "token_ids": [0, 1], "model": "org/m", "target": "t"}
    about |= {"target_token": 0, "target_text": "t", "value": 1.0, "probability": 0.5, "mode": "gradient"}
    rest = {"integrated": 0, "keep": 1.0, "places": [place], "edges": [], "sums": {}, "drift": 0.0, "runs": [run]}
    write_graph(AttributionGraph(**about, **rest, nodes=nodes), tmp_path / "graph.json", features=True)
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "features" / "org-m").iterdir()}
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert set(files) == {str(node["feature"]) for node in graph["nodes"]}
    wanted = {"transcoder_id", "index", "examples_quantiles", "top_logits", "bottom_logits", "act_min", "act_max"}
    wanted |= {"quantile_values", "histogram", "activation_frequency"}
    for number, content in files.items():
        assert set(content) == wanted and content["act_min"] <= 0 <= content["act_max"]
        latent = next(node for node in graph["nodes"] if str(node["feature"]) == number)
        row = run.index.latent(content["index"], -1 if latent["activation"] < 0 else 1)
        assert content["top_logits"] == row["promoted"] and content["activation_frequency"] == row["density"]
        examples = [e for group in content["examples_quantiles"] for e in group["examples"]]
        assert examples and all(len(e["tokens"]) == len(e["tokens_acts_list"]) for e in examples)
