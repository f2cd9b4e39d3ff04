"""One model over two processes (gloo, on a CPU): what it computes, and the commands that use it, are those of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.attribution import read_graph
from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.features import FeatureIndex
from saelab.lm.fingerprint import rounding_gap, row_gaps, same_activations
from saelab.sae import build
from saelab.sae.weights import save as save_sae
from tests import tiny_lm

IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))
HOOKS = [f"blocks.1.{point}" for point in ("hook_attn_out", "hook_mlp_out", "hook_resid_post")]
FAMILIES = {
    "llama": (tiny_lm.save_llama, "float32"),
    "qwen2": (tiny_lm.save_qwen2, "float32"),
    "gemma3": (tiny_lm.save_gemma3, "bfloat16"),
}


def no_further(found: torch.Tensor, other: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether ``found`` is about as close to the gradient in float64 as what one process computes in its precision.

    A gradient gathers the roundings of all blocks, forwards and back, so that no bound from the precision alone is
    tight; two runs that round independently differ in their distance by less than a factor of two.
    """
    return float(row_gaps(found, exact).median()) <= 2 * float(row_gaps(other, exact).median())


def compare_family(folder: Path, dtype: str) -> dict[str, Any]:
    """What one of two processes finds different between its divided model and transformers' own, undivided."""
    from transformers import AutoModelForCausalLM

    from saelab.harvesting.activations import Reader
    from saelab.lm import load_model, locate, unembedding, weights_fingerprint
    from saelab.steering import Add, SteeringVector, generate

    model: Any = load_model(folder, dtype=dtype, tensor_parallel=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    plain.tokenizer = model.tokenizer
    with torch.no_grad():
        expected = plain(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    residual = Reader(model, [locate(model, f"blocks.{i}.hook_resid_pre") for i in range(3)]).activations(IDS)
    both = [Reader(m, [locate(m, name) for name in HOOKS]).gradients(IDS) for m in (model, plain)]
    double = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    exact = Reader(double, [locate(double, name) for name in HOOKS]).gradients(IDS)[1]
    torch.manual_seed(0)
    vector = SteeringVector.from_tensor(torch.randn(16), HOOKS[-1])
    texts = [generate(m, ["the cat"], [Add(vector, 40.0)], max_new_tokens=4) for m in (model, plain)]
    refused = []
    for name in ("blocks.1.attn.hook_z", "blocks.1.mlp.hook_post", "model.layers.1.self_attn.q_proj"):
        try:
            locate(model, name)
        except UserError as error:
            refused.append(str(error))
    return {
        "residual": all(same_activations(x, y, i + 1) for i, (x, y) in enumerate(zip(residual, expected))),
        "sites": all(same_activations(x, y, 2) for x, y in zip(both[0][0], both[1][0])),
        "gradients": all(map(no_further, both[0][1], both[1][1], exact)),
        "fingerprint": weights_fingerprint(model) == weights_fingerprint(plain),
        "unembedding": torch.equal(unembedding(model).weight, unembedding(plain).weight),
        "whole": not any(hasattr(p, "full_tensor") for p in model.parameters()),
        "texts": list(texts[0]) == list(texts[1]),
        "refused": refused,
    }


def program(root: str) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    from saelab.lm import load_model

    found: dict[str, Any] = {n: compare_family(Path(root) / n, dtype) for n, (_, dtype) in FAMILIES.items()}
    try:
        load_model(Path(root) / "gpt2", tensor_parallel=True)
    except UserError as error:
        found["gpt2"] = str(error)
    (Path(root) / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Two processes of torchrun that run a module or a script."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "300"}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=900)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("divided")
    for name, (save, _) in FAMILIES.items():
        save(root / name)
    tiny_lm.save_gpt2(root / "gpt2")
    (root / "text.txt").write_text(tiny_lm.sentences(3000))
    return root


@pytest.mark.minutes
def test_a_divided_model_computes_what_the_whole_one_does(root: Path) -> None:
    script = root / "program.py"
    script.write_text(f"from tests.distributed.test_divided_models import program\nprogram({str(root)!r})\n")
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((root / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    for name in FAMILIES:
        one = found[0][name]
        refused = one.pop("refused")
        assert one == dict.fromkeys(one, True) | {"whole": False}, name
        assert len(refused) == 3 and all("divided over the processes of tensor parallelism" in line for line in refused)
    assert "GPT2LMHeadModel) has no tensor-parallel plan in transformers" in found[0]["gpt2"]


@pytest.mark.minutes
def test_commands_with_a_divided_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Harvest and evaluate under torchrun write what one process writes, once."""
    arguments = ["--text", str(root / "text.txt"), "--tokens", "2000", "--context-length", "32", "--pass-tokens", "256"]
    common = [
        "harvest",
        "--model",
        str(root / "llama"),
        "--hook",
        HOOKS[-1],
        "--shard-bytes",
        "20000",
        "--dtype",
        "float32",
        *arguments,
    ]
    main([*common, "--out", str(root / "one")])
    done = torchrun("-m", "saelab", *common, "--out", str(root / "two"), "--tensor-parallel", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved to") == 1
    one, two = ActivationCache(root / "one"), ActivationCache(root / "two")
    same = ("weights_fingerprint", "weights_rounded", "n_documents", "held_out_from", "settings", "text_fingerprint")
    assert [getattr(one.manifest, name) for name in same] == [getattr(two.manifest, name) for name in same]
    assert len(one.manifest.shards) > 2
    rows = torch.arange(one.n_rows)
    assert torch.equal(one.read(rows).tokens, two.read(rows).tokens)
    assert same_activations(two.read(rows).acts, one.read(rows).acts, 2, torch.float32)

    about = {"hook_name": HOOKS[-1], "model_name": str((root / "llama").resolve())}
    save_sae(build("topk", 16, 64, k=4), root / "run", about)
    evaluate = ["evaluate", str(root / "run"), "--cache", str(root / "one"), "--lm-tokens", "256"]
    main([*evaluate, "--out", str(root / "whole")])
    done = torchrun("-m", "saelab", *evaluate, "--out", str(root / "parts"), "--tensor-parallel", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("saved to") == 1
    metrics = [json.loads((root / name / "evaluation.json").read_text())["metrics"] for name in ("whole", "parts")]
    for name, value in metrics[0].items():
        found = metrics[1][name]["value"]
        assert found == pytest.approx(value["value"], rel=100 * rounding_gap(torch.float32, 4), abs=1e-5), name


@pytest.mark.minutes
def test_steering_attribution_and_index_with_a_divided_model(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one start of two processes, which print and write once what one process does, within the rounding of sums."""
    model, generator = str((root / "llama").resolve()), torch.manual_seed(0)
    acts = torch.randn(200, 16, generator=generator)
    load = {"model": model, "hook_name": HOOKS[-1]}
    ActivationCache.from_tensors(tmp_path / "cache", acts, held_out=0.1, **load)
    save_sae(build("topk", 16, 64, k=4).eval(), tmp_path / "one", {"hook_name": HOOKS[-1], "model_name": model})
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    strength = ["--strength", "40"]
    commands = {
        name: [
            ["steer", run, "--latent", "3", *strength, "--max-new-tokens", "4", "--json", "--prompt", "the cat"],
            ["attribute", run, "--prompt", "the cat", "--any-weights", "--out", str(tmp_path / f"{name}.json")],
            ["index", run, "--cache", str(tmp_path / "cache"), "--any-weights"],
        ]
        for name, run in ((name, str(tmp_path / name)) for name in ("one", "two"))
    }
    for command in commands["one"]:
        main([*command, "--device", "cpu"])
    shown = capsys.readouterr().out
    script = tmp_path / "commands.py"
    lines = [f"main({[*command, '--device', 'cpu', '--tensor-parallel']!r})" for command in commands["two"]]
    script.write_text("from saelab.cli import main\n" + "\n".join(lines) + "\n")  # the index ends the second process
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [text[text.index("{") : text.index("\n}") + 2] for text in (shown, done.stdout)]
    assert json.loads(texts[0])["texts"] == json.loads(texts[1])["texts"]
    assert done.stdout.count('"texts"') == 1
    close = {"rel": 1e-3, "abs": 1e-5}
    graphs = [read_graph(tmp_path / f"{name}.json") for name in ("one", "two")]
    assert graphs[0].value == pytest.approx(graphs[1].value, **close)
    assert {node.id for node in graphs[0].latents[:5]} == {node.id for node in graphs[1].latents[:5]}
    indexes = [FeatureIndex(tmp_path / name) for name in ("one", "two")]
    assert indexes[0].meta["logit_lens"] and indexes[1].meta["logit_lens"]  # of a divided unembedding
    assert indexes[0].table()["count"].equals(indexes[1].table()["count"])


@pytest.mark.minutes  # the first test here is told the same, and test_torchrun.py tests errors that all processes have
def test_what_is_refused_is_one_line_of_one_process(root: Path) -> None:
    command = ["harvest", "--model", str(root / "gpt2"), "--text", str(root / "text.txt"), "--out", str(root / "no")]
    done = torchrun("-m", "saelab", *command, "--tensor-parallel", "--device", "cpu")
    assert done.returncode != 0 and "saelab/cli" not in done.stderr  # torchrun's own stack is the only one
    assert done.stderr.count("has no tensor-parallel plan") == 1
    assert not (root / "no").exists()
