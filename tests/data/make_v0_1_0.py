"""Write the folders of ``tests/data/v0.1.0``: everything that saelab 0.1.0 leaves on disk, and what it reads from it.

Run this with 0.1.0, not with the code of this checkout, in an empty folder, and copy the folder here::

    git worktree add /tmp/saelab-0.1.0 96c5bec
    cd EMPTY_FOLDER && PYTHONPATH=/tmp/saelab-0.1.0 python /path/to/tests/data/make_v0_1_0.py

``expected.json`` and ``expected.safetensors`` hold the numbers that 0.1.0 computes from these files;
``tests/test_compatibility.py`` compares them with those of the current code. Paths inside the files are relative to
the folder, so that a test can copy it anywhere and work from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import saelab
from saelab import ActivationCache
from saelab.checkpoint import save_sae
from saelab.cli import main
from saelab.data.synthetic import Planted
from saelab.features import FeatureIndex
from saelab.features.autointerp import interpret_all
from saelab.interop import load
from saelab.lm import load_hf_model
from saelab.sae import VARIANTS, build
from saelab.steer import Add, Clamp, ProjectOut, Recipe, Run, SteeringVector
from saelab.sweep import load_results, read_grid, run_sweep
from saelab.train import TrainConfig, fit
from saelab.workspace.notes import write_note
from tests import tiny_lm

D_IN, D_SAE, ROWS = 8, 24, 640
WIDTH = 16  # of the language model
CONFIG = TrainConfig(epochs=2, batch_size=96, lr=1e-2, dead_after=300)  # 12 steps
OPTIONS = {"k": 3, "n_steps": 3, "target_l0": 3.0, "density_window": 200}
STOP, CHECKPOINT = 7, 3  # a kill at step 7 goes back to the checkpoint of step 6

# name -> variant, its options, changes to the training configuration
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in sorted(VARIANTS)},
    "abs_topk_batch": ("abs_topk", {"scope": "batch"}, {}),
    "batch_topk_fraction": ("batch_topk", {"k": 2.5, "signed": True}, {}),
    "topk_k_warmup": ("topk", {}, {"k_warmup": 1.0, "k_start": 12}),
    "gradient_topk_warmups": ("gradient_topk", {}, {"k_warmup": 0.75, "beta_warmup": 0.75, "ema": 0.9}),
}
UNFINISHED = ("topk", "abs_topk_batch", "topk_k_warmup", "gradient_topk_warmups", "jump_relu", "matching_pursuit")
GRID = """
[train]
epochs = 2
batch_size = 96
dead_after = 300
[[grid]]
variant = ["topk", "batch_topk"]
d_sae = 16
k = 2
lr = [1e-2, 1e-3]
[halving]
at = [0.4]
"""

tensors: dict[str, Tensor] = {}
numbers: dict[str, Any] = {"caches": {}, "saes": {}, "indexes": {}, "recipes": {}}


def make_language_model() -> None:
    tiny_lm.save_llama(Path("lm"))
    Path("corpus.txt").write_text("\n\n".join(tiny_lm.sentences(60, seed) for seed in range(12)))


def make_caches() -> None:
    common = ["--model", "lm", "--text", "corpus.txt", "--device", "cpu", "--context-length", "32", "--tokens", "1024"]
    for name, hook, *more in (
        ("post", "blocks.1.hook_resid_post"),
        ("pre", "blocks.2.hook_resid_pre"),
        ("gradients", "blocks.1.hook_resid_post", "--gradients"),
        ("mlp", "model.layers.1.mlp", "--dtype", "float32", "--shard-bytes", "16384"),
    ):
        main(["harvest", "--out", f"caches/{name}", "--hook", hook, *common, "--held-out", "0.2", *more])
    make_relative(Path("caches"))
    x, _ = Planted(D_IN, 20, l0=3.0).sample(ROWS, seed=0)
    grads = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1))
    words = [f" w{i}" for i in range(20)]
    tokens = torch.randint(0, 20, (ROWS,), generator=torch.Generator().manual_seed(2))
    ActivationCache.from_tensors(
        "caches/planted", 5 * x, tokens, grads=grads, held_out=0.1, context_length=16, shard_rows=256, vocabulary=words
    )
    for path in sorted(Path("caches").iterdir()):
        numbers["caches"][path.name] = of_cache(ActivationCache(path))


def make_relative(folder: Path) -> None:
    """Name the language model by a path from here: the command line writes absolute ones."""
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text().replace(str(Path("lm").resolve()), "lm"))


def of_cache(cache: ActivationCache) -> dict[str, Any]:
    """What a cache reads: sums over all rows, the first row, hashes of the order in which training sees them."""
    batches = list(cache.batches(96, seed=3, split="train", grads=cache.has_grads))
    acts = torch.cat([b.acts for b in batches]).double()
    grads = [b.grads for b in batches if b.grads is not None]
    tokens = torch.cat([b.tokens for b in batches])
    return {
        "fingerprint": cache.fingerprint,
        "rows": {split: cache.n_split(split) for split in ("train", "held_out")},
        "hook_name": cache.hook_name,
        "sum": acts.sum().item(),
        "squares": acts.square().sum().item(),
        "first": batches[0].acts[0].double().tolist(),
        "grad_squares": torch.cat(grads).double().square().sum().item() if grads else None,
        "order": hashlib.sha256(torch.cat([b.rows for b in batches]).long().numpy().tobytes()).hexdigest(),
        "tokens": hashlib.sha256(tokens.long().numpy().tobytes()).hexdigest(),
    }


def fresh(name: str) -> tuple[Any, TrainConfig]:
    variant, options, train = RUNS[name]
    known = inspect.signature(VARIANTS[variant]).parameters
    torch.manual_seed(0)
    sae = build(variant, D_IN, D_SAE, **{k: v for k, v in OPTIONS.items() if k in known} | options)
    return sae, dataclasses.replace(CONFIG, **train)


def make_runs() -> None:
    cache = ActivationCache("caches/planted")
    for name in RUNS:
        sae, config = fresh(name)
        steps = fit(sae, cache, config, f"runs/{name}", checkpoint_steps=CHECKPOINT)
        for metrics in steps:
            if name in UNFINISHED and metrics.step == STOP:  # as a kill leaves it: the generator is not closed
                shutil.copytree(f"runs/{name}", f"unfinished/{name}")
    sae, config = fresh("batch_topk")
    steps = fit(sae, cache, config, "unfinished/batch_topk")
    for metrics in steps:
        if metrics.step == STOP:
            steps.close()  # as SIGTERM leaves it: a checkpoint of the very step


def make_indexed_runs() -> None:
    small = ["--d-sae", "32", "--k", "3", "--batch-size", "128", "--epochs", "4", "--device", "cpu", "--lr", "1e-2"]
    index = ["--top", "2", "--band", "1", "--random", "2", "--silent", "2", "--bins", "8"]
    for run, variant, cache in (("lm_post", "topk", "post"), ("lm_signed", "abs_topk", "gradients")):
        main(["train", f"caches/{cache}", "--out", f"runs/{run}", "--variant", variant, *small])
        main(["evaluate", f"runs/{run}", "--cache", f"caches/{cache}", "--lm-tokens", "128"])
        main(["index", f"runs/{run}", "--cache", f"caches/{cache}", *index])
    make_relative(Path("runs"))
    found = FeatureIndex("runs/lm_post")
    table = found.table().to_dict("list")
    alive = [(table["latent"][i], table["pole"][i]) for i in range(len(table["latent"])) if table["count"][i] > 8]
    interpret_all(found, alive[:2], Stub(), Stub())
    write_note("runs/lm_post", alive[0][0], "a label", "a note of several words")
    for run in ("lm_post", "lm_signed"):
        numbers["indexes"][run] = of_index(FeatureIndex(f"runs/{run}"))


class Stub:
    """A chat endpoint that needs no network."""

    model = "stub"

    def ask(self, messages: list[dict[str, str]]) -> str:
        judged = re.search(r"list of (\d+) numbers", str(messages))
        return str([1, 0, 1, 1, 0][: int(judged[1])]) if judged else "Explanation: a word of the corpus"


def of_index(index: FeatureIndex) -> dict[str, Any]:
    columns = index.table().to_dict("list")
    latent, pole = max(zip(columns["count"], columns["latent"], columns["pole"]))[1:]
    return {
        "counts": [columns["latent"], columns["pole"], columns["count"]],
        "top": [latent, pole],
        "max_activation": index.max_activation(latent, pole),
        "examples": ["".join(e.strings) for e in index.examples(latent, pole, "top")],
        "columns": sorted(columns),
    }


def make_sweeps() -> None:
    Path("grid.toml").write_text(GRID)
    for members in run_sweep(
        read_grid("grid.toml"), ActivationCache("caches/planted"), "sweeps/api", checkpoint_steps=4
    ):
        if max(member.step for member in members) == 9 and not Path("sweeps/unfinished").exists():
            shutil.copytree("sweeps/api", "sweeps/unfinished")
    shutil.rmtree("sweeps/api")
    main(["sweep", "caches/planted", "grid.toml", "--out", "sweeps/finished", "--device", "cpu"])
    Path("sweeps/finished/report.html").unlink()  # 5 MB, and nothing reads it
    numbers["sweep"] = load_results("sweeps/finished")


def make_foreign() -> None:
    """OpenAI's file of an SAE that reads layer-normed activations."""
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, WIDTH, generator=generator), dim=1)
    Path("foreign").mkdir()
    state = {
        "encoder.weight": W_dec,
        "decoder.weight": W_dec.T.contiguous(),
        "latent_bias": 0.1 * torch.randn(D_SAE, generator=generator),
        "pre_bias": torch.zeros(WIDTH),
        "activation": "TopK",
        "activation_state_dict": {"k": 4},
    }
    torch.save(state, "foreign/autoencoder.pt")
    save_sae(load("foreign/autoencoder.pt"), Path("runs/layer_normed"), {"hook_name": "blocks.1.hook_resid_post"})


def make_recipes() -> None:
    model = load_hf_model("lm")
    hook = "blocks.1.hook_resid_post"
    run, foreign = Run.open("runs/lm_post"), Run.open("foreign/autoencoder.pt", hook)
    latent, pole = numbers["indexes"]["lm_post"]["top"]
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4))
    free = SteeringVector(direction / direction.norm(), float(direction.norm()), hook_name="blocks.2.hook_resid_pre")
    made = {
        "add": [Add(SteeringVector.from_latent(run, latent), "0.8max"), Add(free, 3.0, where=[1, -1])],
        "clamp": [Clamp(run, latent, "2max", pole=pole, where="prompt"), Clamp(run, 5, 4.0)],
        "project_out": [ProjectOut([SteeringVector.from_latent(run, 3), SteeringVector.from_latent(run, 4)])],
        "layer_normed": [Clamp(foreign, 3, 2.0, keep_error=False), Add(SteeringVector.from_latent(foreign, 7), 2.0)],
    }
    tokens = torch.tensor([[0, *range(40, 51)]])
    tensors["recipe_tokens"] = tokens
    tensors["logits/none"] = logits(model, tokens)
    for name, interventions in made.items():
        recipe = Recipe.of(model, interventions, name=name, description="of 0.1.0", provenance={"why": "test"})
        recipe.save(f"recipes/{name}")
        with Recipe.load(f"recipes/{name}").attach(model):
            tensors[f"logits/{name}"] = logits(model, tokens)
        numbers["recipes"][name] = recipe.describe()
    make_relative(Path("recipes"))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits[0, -3:].float().contiguous()


def measure_saes() -> None:
    """The code and the reconstruction of a probe by every trained SAE."""
    for width in (D_IN, WIDTH):
        tensors[f"probe_{width}"] = 4 * torch.randn(12, width, generator=torch.Generator().manual_seed(5))
    for path in sorted(Path("runs").iterdir()):
        sae = load(path).eval()
        with torch.no_grad():
            code = sae.encode(x := tensors[f"probe_{sae.d_in}"])
            tensors[f"code/{path.name}"] = code.dense().float()
            tensors[f"recon/{path.name}"] = sae(x).float().contiguous()
        numbers["saes"][path.name] = {"variant": sae.variant, "config": sae.config}


if __name__ == "__main__":
    assert saelab.__version__ == "0.1.0", f"this is saelab {saelab.__version__}; run it with 0.1.0"
    assert not any(Path().iterdir()), "run it in an empty folder"
    torch.set_num_threads(1)
    make_language_model()
    make_caches()
    make_runs()
    make_indexed_runs()
    make_sweeps()
    make_foreign()
    make_recipes()
    measure_saes()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "expected.safetensors")
    Path("expected.json").write_text(json.dumps(numbers, indent=1, default=float) + "\n")
