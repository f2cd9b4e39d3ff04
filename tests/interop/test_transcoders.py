"""Transcoders of every tool: read with both places and the tool's own arithmetic, written, and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saelab.cli import main
from saelab.errors import UserError
from saelab.interop import export, load
from saelab.interop.conversion import add_layer
from saelab.runs import Run
from saelab.sae import build
from saelab.sae.weights import save
from tests.interop import collected
from tests.interop.collected import D_IN, D_SAE, K, put, threshold, weights

READS, WRITES = "blocks.8.mlp.hook_in", "blocks.8.hook_mlp_out"
NORMED = "blocks.8.ln2.hook_normalized"
HF = tuple(f"model.layers.8.{name}_feedforward_layernorm.output" for name in ("pre", "post"))
Plain = Callable[[Tensor], Tensor]
SKIP = torch.linspace(-1, 1, D_IN * D_IN).view(D_IN, D_IN)


def plain(x: Tensor, keep: Callable[[Tensor], Tensor], scale: float = 1.0, out: float = 1.0) -> Tensor:
    """The tool's own formula: encode without subtracting anything, keep some latents, decode."""
    w = weights()
    return (keep(scale * x @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]) / out


def jump(u: Tensor) -> Tensor:
    return u * (u > threshold())


def top(u: Tensor) -> Tensor:
    u = u.relu()
    return u * (u >= u.topk(K).values[:, -1:])


def saelens(root: Path) -> tuple[Path, Plain]:
    more = {"d_out": D_IN, "metadata": {"hook_name_out": WRITES}, "apply_b_dec_to_input": False}
    tensors = {"threshold": threshold(), "W_skip": SKIP}
    path = collected.saelens(root / "sae", "jumprelu_skip_transcoder", READS, tensors=tensors, **more)
    return path, lambda x: plain(x, jump) + x @ SKIP.T


def saelens_relu(root: Path) -> tuple[Path, Plain]:
    more = {"d_out": D_IN, "metadata": {"hook_name_out": WRITES}}
    return collected.saelens(root / "sae", "transcoder", READS, **more), lambda x: plain(x, torch.relu)


def sparsify(root: Path) -> tuple[Path, Plain]:
    path = collected.sparsify(root / "layers.8.mlp", transcode=True, skip_connection=True)
    tensors = load_file(path / "sae.safetensors")
    put(path / "sae.safetensors", {**tensors, "W_skip": SKIP})
    return path, lambda x: plain(x, top) + x @ SKIP.T


def gemma_1(root: Path) -> tuple[Path, Plain]:
    folder = root / "gemma-scope-2b-pt-transcoders" / "layer_8" / "width_16k" / "average_l0_6"
    return collected.gemma_scope(folder), lambda x: plain(x, jump)


def gemma_2(root: Path) -> tuple[Path, Plain]:
    return collected.gemma_scope_2(root / "layer_8_width_16k", *HF, type="transcoder"), lambda x: plain(x, jump)


def gemma_2_skip(root: Path) -> tuple[Path, Plain]:
    folder = collected.gemma_scope_2(root / "layer_8_affine", *HF, type="transcoder", affine_connection=True)
    w = {name.replace("W_", "w_"): value for name, value in weights().items()}
    put(folder / "params.safetensors", {**w, "threshold": threshold(), "affine_skip_connection": SKIP})
    return folder, lambda x: plain(x, jump) + x @ SKIP  # stored as [d_in, d_out]


def llama(root: Path) -> tuple[Path, Plain]:
    norms = {"in": 10.0, "out": 4.0}
    path = collected.llama_scope(root / "L8TC-8x", NORMED, WRITES, dataset_average_activation_norm=norms)
    scale, out = D_IN**0.5 / 10, D_IN**0.5 / 4
    return path, lambda x: plain(x, lambda u: u * (u > 0.2 * out), scale, out)


def llamascopium(root: Path) -> tuple[Path, Plain]:
    path = collected.llamascopium(root / "tc", NORMED, WRITES)
    tensors = load_file(path / "sae_weights.safetensors")
    put(path / "sae_weights.safetensors", {**tensors, f"dataset_average_activation_norm.{WRITES}": torch.tensor(4.0)})
    return path, lambda x: plain(x, top, D_IN**0.5 / 10, D_IN**0.5 / 4)


def circuit_tracer(root: Path) -> tuple[Path, Plain]:
    w = weights()
    put(root / "layer_8.safetensors", {**w, "W_enc": w["W_enc"].T, "activation_function.threshold": threshold()})
    (root / "config.yaml").write_text('feature_input_hook: "mlp.hook_in"\nfeature_output_hook: hook_mlp_out\n')
    return root / "layer_8.safetensors", lambda x: plain(x, jump)


@pytest.mark.parametrize(
    "make",
    [saelens, saelens_relu, sparsify, gemma_1, gemma_2, gemma_2_skip, llama, llamascopium, circuit_tracer],
    ids=lambda make: make.__name__,
)
def test_a_published_transcoder_computes_what_its_tool_does(make, tmp_path):
    root = tmp_path / "files"
    root.mkdir()
    path, formula = make(root)
    run = Run.open(path)
    x = 3 * torch.randn(64, D_IN, generator=torch.Generator().manual_seed(0))
    assert run.sae.transcodes and run.d_sae == D_SAE
    # Gemma Scope 1 folded the norm's gain into the MLP, and reads without it.
    assert run.hook_name == (NORMED if make in (gemma_1, llama, llamascopium) else READS)
    assert run.hook_name_out == WRITES
    expected = formula(x)
    assert (run.sae(x) - expected).norm() <= 1e-5 * expected.norm()
    main(["convert", str(path), str(tmp_path / "ours"), "--to", "saelab"])
    again = Run.open(tmp_path / "ours")
    assert (again.hook_name, again.hook_name_out) == (run.hook_name, run.hook_name_out)
    assert (again.sae(x) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("variant", "to"),
    [
        ("topk", "sparsify"),
        ("topk", "circuit-tracer"),
        ("batch_topk", "saelens"),
        ("batch_topk", "circuit-tracer"),
        ("jump_relu", "saelens"),
        ("relu", "saelens"),
        ("abs_topk", "sparsify"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_written_and_read_back(variant, to, skip, tmp_path):
    sae = perturbed(variant, skip)
    export(sae, tmp_path / "out", to, {"hook_name": READS, "hook_name_out": WRITES, "model_name": "m"})
    other = load(tmp_path / "out")
    x = torch.randn(64, D_IN)
    assert (other(x) - sae(x)).norm() <= 1e-4 * sae(x).norm()


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    sae = build("topk", D_IN, D_SAE, d_out=D_IN).eval()
    about = {"hook_name": READS, "hook_name_out": WRITES}
    for to, why in (
        ("saelens", "SAELens has no topk transcoder"),
        ("dictionary-learning", "no place for a transcoder"),
    ):
        with pytest.raises(UserError, match=why):
            export(sae, tmp_path / to, to, about)
    with pytest.raises(UserError, match="holds transcoders, and this SAE reconstructs"):
        export(build("topk", D_IN, D_SAE).eval(), tmp_path / "ct", "circuit-tracer", about)
    with pytest.raises(UserError, match="reads 16 and writes 24"):
        export(build("topk", D_IN, D_SAE, d_out=24).eval(), tmp_path / "wide", "sparsify", about)
    save(sae, tmp_path / "run", about)
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "run"), str(tmp_path / "x"), "--to", "saelens"])


def test_layers_are_added_to_a_set_of_circuit_tracer(tmp_path, capsys):
    for layer in (0, 1):
        places = {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
        save(perturbed("batch_topk", True), tmp_path / f"run{layer}", {**places, "model_name": "m"})
        main(["convert", str(tmp_path / f"run{layer}"), str(tmp_path / "set"), "--to", "circuit-tracer"])
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "config.yaml", "layer_0.safetensors", "layer_1.safetensors",
    ]  # fmt: skip
    assert sorted(run.hook_name for run in Run.scan(tmp_path / "set").values()) == [
        f"blocks.{layer}.mlp.hook_in" for layer in (0, 1)
    ]
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "run1"), str(tmp_path / "set"), "--to", "circuit-tracer"])
    assert "has layer_1.safetensors already" in " ".join(capsys.readouterr().err.split())
    save(perturbed("batch_topk", True), tmp_path / "other", {"hook_name": READS, "hook_name_out": WRITES})
    with pytest.raises(UserError, match="another model or other hook points"):
        add_layer(load(tmp_path / "other"), tmp_path / "set", {"hook_name": READS, "hook_name_out": WRITES})


@pytest.mark.parametrize("variant", ["relu", "jump_relu", "batch_topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_saelens_computes_the_same(variant, skip, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed here; run `make test-interop`")
    sae = perturbed(variant, skip)
    export(sae, tmp_path / "out", "saelens", {"hook_name": READS, "hook_name_out": WRITES, "model_name": "gpt2"})
    save(sae, tmp_path / "run", {"hook_name": READS, "hook_name_out": WRITES, "model_name": "gpt2"})
    x = torch.randn(64, D_IN)
    for folder in ("out", "run"):  # a run folder is in its format, too
        theirs = sae_lens.SAE.load_from_disk(tmp_path / folder)
        assert (theirs(x) - sae(x)).abs().max() <= 1e-4 * sae(x).abs().max()


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_computes_the_same(skip, tmp_path):
    coders = pytest.importorskip("sparsify", reason="sparsify is not installed here; run `make test-interop`")
    sae = perturbed("topk", skip)
    export(sae, tmp_path / "out", "sparsify", {"hook_name": READS, "hook_name_out": WRITES})
    theirs = coders.SparseCoder.load_from_disk(str(tmp_path / "out"))
    x = torch.randn(64, D_IN)
    assert (theirs(x, sae(x)).sae_out - sae(x)).abs().max() <= 1e-4 * sae(x).abs().max()


def perturbed(variant, skip):
    """A transcoder with every parameter away from its start."""
    torch.manual_seed(0)
    sae = build(variant, D_IN, D_SAE, d_out=D_IN, skip=skip)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if variant == "jump_relu":
            sae.threshold.clamp_(min=0)  # as in training
        if variant == "batch_topk":
            sae.threshold.set_(torch.tensor(0.3, dtype=torch.float64))
    return sae.eval()
