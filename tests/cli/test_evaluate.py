"""``saelab evaluate --tasks`` and ``--saebench``: planted concepts through the command, and input that is refused."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import TaskConfig, run_tasks, saebench_json
from saelab.evaluation.tasks.two_sided import Firings, two_sidedness
from saelab.sae import build
from saelab.sae.weights import save

D, VOCAB, T = 16, 104, 16


class ToyLM(nn.Module):
    """An embedding as the only layer below the hook: what a text activates is known."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = 0.5 + 0.1 * torch.randn(VOCAB, D, generator=generator)
        # Axis t % 13 carries the first letter of token t; the upper half of the tokens carries one more concept.
        table[torch.arange(VOCAB), torch.arange(VOCAB) % 13] += 2.0
        table[VOCAB // 2 :, 14] += 2.0
        self.embed = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList([nn.Identity()])
        self.head = nn.Linear(D, VOCAB, bias=False)
        self.tokenizer = Tokenizer()

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(self.layers[0](self.embed(input_ids))))


class Tokenizer:
    bos_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(word) for word in text.split()]}


def word(token):
    return f" {chr(97 + token % 13) * 3}{'x' * (token // 13)}"


@pytest.fixture
def world(tmp_path, monkeypatch):
    model = ToyLM().eval()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (320, T), generator=generator)
    tokens[:, 0] = 0
    documents = (torch.arange(320) // 40)[:, None].expand(320, T).contiguous()
    # Every article prefers some tokens, so that articles can be told apart.
    own = torch.rand(320, T, generator=generator) < 0.4
    tokens = torch.where(own, documents + 1 + 52 * (tokens % 2), tokens)
    acts = model.embed(tokens)
    vocabulary = [word(t) for t in range(VOCAB)]
    vocabulary[3] = " 1984"
    cache = ActivationCache.from_tensors(
        tmp_path / "cache", acts, tokens, documents=documents, held_out=0.2, model="toy", bos="context",
        hook_name="blocks.0.hook_resid_post", hf_hook_name="layers.0", vocabulary=vocabulary,
    )  # fmt: skip
    sae = build("topk", d_in=D, d_sae=D, k=6).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(D))
        sae.W_enc.copy_(torch.eye(D))
        sae.b_dec.zero_()
    save(sae, tmp_path / "run", {"model_name": "toy", "hook_name": cache.hook_name})
    monkeypatch.setattr("saelab.lm.record.load_model", lambda name, **_: model)
    return SimpleNamespace(model=model, cache=cache, sae=sae, path=tmp_path)


def labelled_file(world, n=120):
    """Concept a: the upper half of the vocabulary (axis 14); concept b: tokens on axis 5."""
    generator = torch.Generator().manual_seed(2)
    lines = []
    for i in range(n):
        a, b = i % 2, (i // 2) % 2
        text = torch.randint(1, VOCAB // 2, (6,), generator=generator) + a * (VOCAB // 2)
        text[:3] = 5 + 52 * a if b else text[:3]
        lines.append(json.dumps({"text": " ".join(map(str, text.tolist())), "a": a, "b": b, "c": 2 * a + b}))
    path = world.path / "labels.jsonl"
    path.write_text("\n".join(lines))
    return path


def numbers(content):
    if isinstance(content, dict):
        return [x for value in content.values() for x in numbers(value)]
    if isinstance(content, list):
        return [x for value in content for x in numbers(value)]
    return [content] if isinstance(content, int | float) else []


def test_label_tasks_read_held_out_rows_unless_told_otherwise(world, capsys):
    run = world.path / "run"
    args = ["evaluate", str(run), "--cache", str(world.path / "cache"), "--lm-tokens", "0", "--passage-tokens", "4"]
    with pytest.raises(SystemExit):  # the held-out documents are two, one label of scr is nearly constant
        main([*args, "--tasks", "tpp"])
    assert "task-split all" in capsys.readouterr().err
    main([*args, "--tasks", "probing", "--columns", "article", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"]["documents"] == len(world.cache.documents("held_out").unique()) == 2
    assert printed["settings"]["documents_trained_on"] == 0
    passages = printed["tasks"]["probing"]["article"]["dense_probe_test_accuracy"]["n"]
    assert passages <= world.cache.n_split("held_out") // 4


def test_latents_that_other_seeds_share(world, capsys):
    other = build("topk", d_in=D, d_sae=D, k=6).eval()
    with torch.no_grad():
        other.W_dec.copy_(torch.eye(D))
        other.W_dec[D // 2 :] = -other.W_dec[D // 2 :]  # the other half points away
    save(other, world.path / "seed", {"model_name": "toy", "hook_name": world.cache.hook_name})
    args = ["evaluate", str(world.path / "run"), "--cache", str(world.path / "cache"), "--lm-tokens", "0", "--json"]
    main([*args, "--seeds", str(world.path / "seed")])
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["latents_shared_by_seeds"]["value"] == 0.5
    assert metrics["latents_shared_by_chance"]["value"] < 0.4
    found = json.loads((world.path / "run" / "stability.json").read_text())
    assert found["found"] == [1] * (D // 2) + [0] * (D // 2)  # of each latent, how many other seeds have it
    with pytest.raises(SystemExit):
        main([*args, "--seeds", str(world.path / "run")])
    assert "is the SAE itself" in capsys.readouterr().err


def test_every_task_on_the_text_of_the_cache(world, capsys):
    run, out = world.path / "run", world.path / "bench"
    main([
        "evaluate", str(run), "--cache", str(world.path / "cache"), "--lm-tokens", "0", "--passage-tokens", "8",
        "--tasks", "probing,scr,tpp", "absorption,two-sided", "--saebench", str(out), "--json", "--task-split", "all",
        "--min-letters", "10",
    ])  # fmt: skip
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "evaluation.json").read_text())
    tasks = printed["tasks"]
    assert list(tasks) == ["probing", "scr", "tpp", "absorption", "two-sided"]
    assert set(tasks["probing"]) == {"article", "year"}
    assert tasks["probing"]["article"]["dense_probe_test_accuracy"]["value"] > 0.75
    assert tasks["tpp"]["article"]["classes"] == 8
    assert set(tasks["tpp"]) == {"article"}
    assert tasks["scr"]["article / year"]["tasks"] >= 1
    assert tasks["two-sided"]["two_sided_fraction"]["value"] == 0
    assert all(map(math.isfinite, numbers(printed)))
    files = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/run_custom_sae_eval_results.json")}
    assert set(files) == {"core", "sparse_probing", "scr", "tpp", "absorption"}
    assert files["absorption"]["eval_type_id"] == "absorption_first_letter"
    probing = files["sparse_probing"]["eval_result_metrics"]
    accuracies = [tasks["probing"][label]["sae_top_2_test_accuracy"]["value"] for label in ("article", "year")]
    assert probing["sae"]["sae_top_2_test_accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert set(probing["llm"]) == {"llm_test_accuracy", *(f"llm_top_{k}_test_accuracy" for k in (1, 2, 5))}
    tpp = files["tpp"]["eval_result_metrics"]["tpp_metrics"]
    kinds = ("intended_diff_only", "unintended_diff_only", "total_metric")
    intended, unintended, total = (tpp[f"tpp_threshold_5_{kind}"] for kind in kinds)
    assert total == pytest.approx(intended - unintended)
    scr = files["scr"]["eval_result_metrics"]["scr_metrics"]
    assert {"scr_metric_threshold_2", "scr_dir1_threshold_2", "scr_dir2_threshold_2"} <= set(scr)
    assert files["core"]["eval_result_metrics"]["sparsity"]["l0"] == printed["metrics"]["l0"]["value"]


def test_a_labelled_file_runs_through_the_model(world, capsys):
    path = labelled_file(world)
    arguments = ["evaluate", str(world.path / "run"), "--cache", str(world.path / "cache"), "--lm-tokens", "0"]
    main([*arguments, "--tasks", "probing,scr,tpp", "--labels", str(path)])
    shown, said = capsys.readouterr()
    assert "2605.18229" in " ".join(said.split())
    assert "probing a: sae_top_1" in shown
    assert "scr a / b: 20 random" in shown
    tasks = json.loads((world.path / "run" / "evaluation.json").read_text())["tasks"]
    assert tasks["probing"]["a"]["sae_top_1_test_accuracy"]["value"] == 1.0
    assert set(tasks["scr"]) == {"a / b"}
    assert set(tasks["tpp"]) == {"c"}  # two classes have no others to spare
    main([*arguments, "--tasks", "probing", "--labels", str(path), "--columns", "b", "--json"])
    assert list(json.loads(capsys.readouterr().out)["tasks"]["probing"]) == ["b"]
    main([*arguments, "--saebench", str(world.path / "core.json")])
    assert json.loads((world.path / "core.json").read_text())["eval_type_id"] == "core"


BAD = {
    "one class": (['{"text": "1 2", "a": 1}'] * 60, ["--tasks", "probing"], "one class only"),
    "too few": (['{"text": "1", "a": 1}', '{"text": "3", "a": 0}'], ["--tasks", "probing"], "fewer than two classes"),
    "two classes": ([f'{{"text": "1", "a": {i % 2}}}' for i in range(60)], ["--tasks", "tpp"], "three classes"),
    "two of them named": (
        [f'{{"text": "1", "a": {i % 2}}}' for i in range(60)],
        ["--tasks", "tpp", "--columns", "a"],
        "three classes",
    ),
    "an empty document": (
        ['{"text": "1", "a": 1}', '{"text": "  ", "a": 0}'],
        ["--tasks", "probing"],
        "labels.jsonl:2",
    ),
    "one label for scr": ([f'{{"text": "1", "a": {i % 2}}}' for i in range(60)], ["--tasks", "scr"], "two labels"),
    "an unknown label": (['{"text": "1", "a": 1}'], ["--tasks", "probing", "--columns", "c"], "no label 'c'"),
    "an unknown task": (['{"text": "1", "a": 1}'], ["--tasks", "probbing"], "did you mean"),
    "no task for labels": (['{"text": "1", "a": 1}'], ["--tasks", "absorption"], "labels serve"),
    "two kinds of result in one file": (['{"text": "1", "a": 1}'], ["--tasks", "tpp", "--saebench", "x.json"], "one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_are_refused_in_one_line(world, capsys, case):
    lines, options, message = BAD[case]
    path = world.path / "labels.jsonl"
    path.write_text("\n".join(lines))
    before = sorted(p.name for p in (world.path / "run").iterdir())
    with pytest.raises(SystemExit) as error:
        main([
            "evaluate", str(world.path / "run"), "--cache", str(world.path / "cache"), "--lm-tokens", "0",
            "--labels", str(path), *options,
        ])  # fmt: skip
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(p.name for p in (world.path / "run").iterdir()) == before


def test_models_and_caches_that_do_not_fit_are_refused(world):
    path = labelled_file(world)
    config = TaskConfig(("probing",), labels=path)
    with pytest.raises(UserError, match="another model"):
        run_tasks(world.sae, world.cache, config, ToyLM(seed=5).eval())
    with pytest.raises(UserError, match="needs the language model"):
        run_tasks(world.sae, world.cache, config)
    with pytest.raises(UserError, match="width"):
        run_tasks(build("topk", d_in=5, d_sae=9, k=2), world.cache, TaskConfig(("two-sided",)))
    bare = ActivationCache.from_tensors(world.path / "bare", torch.randn(100, D), held_out=0.1)
    with pytest.raises(UserError, match="no vocabulary"):
        run_tasks(world.sae, bare, TaskConfig(("absorption",)))
    with pytest.raises(UserError, match="shorten the passages"):
        run_tasks(world.sae, bare, TaskConfig(("probing",)))
    silent = build("topk", d_in=D, d_sae=D, k=2).eval()
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    with pytest.raises(UserError, match="no latent fires"):
        run_tasks(silent, bare, TaskConfig(("two-sided",)))


def test_a_single_document_gives_numbers_and_no_intervals(world, capsys):
    """All rows of one document, of which a part was trained on: nothing is NaN, and what cannot be said is said."""
    acts = world.cache.read(torch.arange(world.cache.n_rows)).acts
    one = ActivationCache.from_tensors(
        world.path / "one", acts, documents=torch.zeros(len(acts)), context_length=T, held_out=0.2, model="toy",
        hook_name=world.cache.hook_name,
    )  # fmt: skip
    args = ["evaluate", str(world.path / "run"), "--cache", str(one.path), "--lm-tokens", "0", "--tasks", "two-sided"]
    main([*args, "--control-kinds", "untrained,raw_channels,frozen_dictionary"])
    shown, said = (" ".join(text.split()) for text in capsys.readouterr())
    assert "cannot say, 1 document is too few to resample" in shown
    assert "have training rows too" in said
    content = json.loads((world.path / "run" / "evaluation.json").read_text())
    assert all(map(math.isfinite, numbers(content)))
    assert content["metrics"]["fvu"]["low"] is None
    assert "run.json" in content["controls"]["frozen_dictionary"]["cannot"]
    with pytest.raises(SystemExit):  # one document is one class
        main([*args[:-1], "probing"])
    assert "error:" in capsys.readouterr().err


def test_opposite_pairs_have_opposite_effects_on_logits():
    """Two antipodal latents, and a pair whose readout is turned by a rotation no cosine of directions shows."""
    readout = torch.randn(3, 50)
    W_dec = torch.tensor([[1.0, 0, 0], [-1.0, 0.1, 0]])
    latents, tokens = torch.tensor([0, 1]).repeat(40), torch.arange(80)
    firings = Firings(latents, torch.ones(80), tokens, 80, 2)
    got = two_sidedness(SimpleNamespace(directions=W_dec, W_dec=W_dec), firings, readout=readout)
    a, b = W_dec @ (readout - readout.mean(1, keepdim=True))
    assert got["pole_logit_cosine"].value == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-5)
    signed = Firings(torch.zeros(80, dtype=torch.int64), torch.tensor([1.0, -1.0]).repeat(40), tokens, 80, 2)
    got = two_sidedness(SimpleNamespace(directions=W_dec, W_dec=W_dec), signed, readout=readout)
    assert got["pole_logit_cosine"].value == pytest.approx(-1, abs=1e-6)


def test_tasks_without_a_counterpart_write_no_document():
    assert saebench_json.task_metrics("two-sided", {}) is None
