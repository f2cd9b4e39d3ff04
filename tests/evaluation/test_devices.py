"""Devices without float64, and language models on another device than the cache and the tokens."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.cli import COMMANDS, main
from saelab.data.cache import ActivationCache
from saelab.devices import in_float64, pick_device, widest_float
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, TaskConfig, evaluate, run_tasks
from saelab.features import build_index
from saelab.harvesting import HarvestConfig, harvest
from saelab.kernels import use_backend
from saelab.lm import load_hf_model, load_model
from saelab.prompt.reading import read_prompt
from saelab.sae import VARIANTS, build
from saelab.sae.options import defaults as option_defaults
from saelab.sae.weights import save
from saelab.steering import Ablate, Add, Run, SteeringVector, calibrate, generate
from saelab.steering.directions import difference_of_means
from saelab.training import TrainConfig, train
from tests import tiny_lm
from tests.pretend_gpu import CUDA, MPS, PretendGpu, Remote, move, remote

HOOK = "blocks.1.hook_resid_post"
# One of each kind of selection: by token, by batch, by a threshold, by gradients, one latent after another.
KINDS = ("topk", "batch_topk", "jump_relu", "gradient_topk", "matching_pursuit")
SOME = [pytest.param(name, marks=[] if name in KINDS else pytest.mark.minutes) for name in VARIANTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("devices")
    tiny_lm.save_llama(root / "model")
    (root / "text.txt").write_text(tiny_lm.sentences(400))
    config = HarvestConfig(tokens=400, context_length=10, held_out=0.3)
    harvest(load_model(root / "model", device="cpu"), HOOK, root / "text.txt", root / "cache", config)
    return root


def plain(folder: Path) -> Any:
    model = load_hf_model(folder / "model", device="cpu")
    model.tokenizer = tiny_lm.tokenizer()
    return model


def small_sae(cache: ActivationCache) -> Any:
    sae = build("topk", d_in=cache.d_in, d_sae=32, k=4).eval()
    with torch.no_grad():
        sae.b_dec.copy_(torch.tensor(cache.manifest.mean))
    return sae


def test_the_pretended_device_does_not_mix() -> None:
    with PretendGpu():
        x, y = remote(torch.ones(3)), torch.ones(3)
        assert (x.device, y.device, (x + 1).device, y.to("cuda").device) == (CUDA, y.cpu().device, CUDA, CUDA)
        assert torch.equal((x + y.to(x)).cpu(), 2 * y)
        for mixed in (lambda: x + y, lambda: torch.where(y > 0, x, x), lambda: x.gather(0, torch.zeros(1).long())):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


def test_the_pretended_mps_has_no_float64() -> None:
    with PretendGpu(MPS):
        x = torch.ones(3, device="mps")
        assert (x.device, (x + 1).device, x.cpu().double().dtype) == (MPS, MPS, torch.float64)
        for wide in (x.double, lambda: torch.ones(3).double().to("mps"), lambda: x.sum(dtype=torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                wide()
        assert (in_float64(x).device.type, in_float64(x).dtype) == ("cpu", torch.float64)
    assert [widest_float(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [torch.float64] * 2 + [
        torch.float32
    ]


@pytest.mark.parametrize("variant", SOME)
def test_a_device_without_float64_trains_and_evaluates(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: torch.zeros(1))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: None)
    generator = torch.Generator().manual_seed(0)
    acts, grads = torch.randn(2, 60, 20, 8, generator=generator)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts, grads=grads, held_out=0.3)
    config, found = TrainConfig(batch_size=64, epochs=2, lr=1e-3), []
    options = {"k": 4} if "k" in option_defaults(VARIANTS[variant]) else {}
    for device in ("cpu", "mps"):
        torch.manual_seed(0)
        with PretendGpu(MPS), use_backend("reference"):
            sae = build(variant, d_in=8, d_sae=32, **options).to(device)
            assert sae.device.type == device
            last = train(sae, cache, config, tmp_path / device)
            metrics = evaluate(sae, cache, None, EvaluateConfig(density_tokens=100)).metrics
        found.append([last.fvu, last.l0, metrics["fvu"].value, metrics["l0"].value])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("device", [CUDA, MPS])
def test_evaluation_moves_what_meets_the_model(device: torch.device, folder: Path) -> None:
    cache = ActivationCache(folder / "cache")
    config, sae = EvaluateConfig(density_tokens=0), small_sae(cache)
    expected = evaluate(sae, cache, plain(folder), config)
    model = move(plain(folder))
    with PretendGpu(device):
        assert isinstance(next(model.parameters()), Remote)
        got = evaluate(sae, cache, model, config)
    for name, estimate in expected.metrics.items():
        assert got[name] == pytest.approx(estimate.value, rel=1e-5, abs=1e-7), name


def test_the_index_of_an_sae_elsewhere_is_the_same(folder: Path, tmp_path: Path) -> None:
    cache, strings = ActivationCache(folder / "cache"), [str(number) for number in range(999)]
    sae = small_sae(cache)
    with use_backend("reference"):
        expected = build_index(sae, cache, tmp_path / "here", token_strings=strings).table()
        with PretendGpu():
            found = build_index(move(sae), cache, tmp_path / "there", token_strings=strings).table()
    for name in ("count", "max", "mean", "q50", "token_entropy", "norm_corr", "decoder_norm"):
        assert str(found[name].tolist()) == str(expected[name].tolist()), name


def test_labelled_texts_run_through_a_model_elsewhere(folder: Path, tmp_path: Path) -> None:
    cache = ActivationCache(folder / "cache")
    lines = [{"text": tiny_lm.sentences(6, seed), "label": "ab"[seed % 2]} for seed in range(60)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks = TaskConfig(tasks=("probing",), labels=tmp_path / "labels.jsonl")
    sae = small_sae(cache)
    expected = run_tasks(sae, cache, tasks, plain(folder))
    model = move(plain(folder))
    with PretendGpu():
        assert run_tasks(sae, cache, tasks, model) == expected


@pytest.mark.parametrize("device", [CUDA, MPS])
def test_steering_runs_on_a_model_elsewhere(device: torch.device, folder: Path) -> None:
    cache = ActivationCache(folder / "cache")
    run = Run(small_sae(cache), HOOK)
    vector = SteeringVector.from_latent(run, 3)

    def everything(model: Any) -> Any:
        with torch.no_grad():
            texts = generate(
                model, ["the cat", "seven ships left"], [Add(vector, 2.0), Ablate(run, 5)], max_new_tokens=3
            )
            means = difference_of_means(model, HOOK, ["the cat sat", "rain"], ["ships left"])
            found = calibrate(model, vector, ["the cat sat on"], budget_kl=0.1)
        return texts, means.norm, found.strength

    expected = everything(plain(folder))
    model = move(plain(folder))
    with PretendGpu(device):
        got = everything(model)
    assert got[0] == expected[0]
    assert got[1:] == pytest.approx(expected[1:], rel=1e-5)


def test_gradients_of_a_prompt_go_to_the_sae(folder: Path) -> None:
    """An SAE that selects by gradients at inference, on another device than the language model."""
    model = load_model(folder / "model", device="cpu")
    sae = build("gradient_topk", d_in=16, d_sae=32, k=4, grad_select="eval_only", grad_norm="none").eval()
    expected = read_prompt(model, sae, "the cat sat on", HOOK)
    move(sae)
    with PretendGpu(), use_backend("reference"):
        got = read_prompt(model, sae, "the cat sat on", HOOK)
        assert (got.acts.device, got.recon.device) == (CUDA, CUDA)
        assert got.grads is not None
        assert got.grads.device == CUDA
        torch.testing.assert_close(got.recon.cpu(), expected.recon, rtol=1e-4, atol=1e-5)


def test_models_go_where_auto_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One meaning of ``device`` for both loaders, in Python and on the command line."""
    asked: list[Any] = []

    def pick(name: str | torch.device) -> torch.device:
        asked.append(name)
        return torch.device("meta" if name == "auto" else name)

    monkeypatch.setattr("saelab.lm.loading.pick_device", pick)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.to", lambda self, device: setattr(self, "went", device) or self)
        assert load_hf_model(folder / "model").went == torch.device("meta")
    load_hf_model(folder / "model", device="cpu")
    load_model(folder / "model", device="cpu")
    assert asked == ["auto", "cpu", "cpu"]
    defaults = {inspect.signature(load).parameters["device"].default for load in (load_model, load_hf_model)}
    assert defaults == {"auto"}


class FakeGpus:
    """Two GPUs, whose tensors are the CPU's; remembers which of them is current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        real = torch.zeros

        def zeros(*size: int, device: torch.device) -> torch.Tensor:
            if device.type == "cuda" and device.index > 1:
                raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later")
            return real(*size)

        monkeypatch.setattr(torch, "zeros", zeros)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "set_device", self.choose)

    def choose(self, device: torch.device) -> None:
        assert device.index is not None  # torch refuses a device without a number
        self.current = device.index


def test_auto_takes_the_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    gpus = FakeGpus(monkeypatch)
    assert pick_device() == torch.device("cuda", 0)
    gpus.current = 1  # as a notebook may have chosen
    assert pick_device() == pick_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 0)
    assert gpus.current == 0


def test_a_gpu_that_is_picked_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What names no device (streams, events, kernels of other libraries) would go to the first GPU instead."""
    gpus = FakeGpus(monkeypatch)
    assert pick_device("cuda:1") == torch.device("cuda", 1) and gpus.current == 1
    assert pick_device("cpu") == torch.device("cpu") and gpus.current == 1
    with pytest.raises(UserError) as error:
        pick_device("cuda:7")
    message = (
        "device 'cuda:7' is not available here (CUDA error: invalid device ordinal); choose auto, cpu, cuda:0, cuda:1"
    )
    assert str(error.value) == message and gpus.current == 1


@pytest.mark.parametrize("name", ["abacus", "cuda:x", "cuda:-1", "meta", "xpu", "mps", "cuda:3"])
def test_a_device_that_is_not_there_is_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as error:
        pick_device(name)
    text = str(error.value)
    assert text.startswith(f"device {name!r} is not available here (") and text.endswith("choose auto, cpu")
    assert "\n" not in text


def test_a_kernel_backend_that_cannot_run_there_is_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit) as error:
        main(["train", str(folder / "cache"), "--out", str(folder / "none"), "--device", "cpu"])
    assert error.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "SAELAB_KERNELS: kernel backend 'triton' was asked for but it works on CUDA or ROCm tensors" in said
    assert not (folder / "none").exists()


def test_every_command_that_computes_takes_a_device() -> None:
    """Of the others, these read or write files only, or convert and compare in the precision of the CPU."""
    files = {"cache", "card", "convert", "explain", "info", "l0", "labels", "map", "plan"}
    for command in COMMANDS.keys() - files:
        source = inspect.getsource(importlib.import_module(f"saelab.cli.commands.{command.replace('-', '_')}"))
        assert "device: str" in source or "ModelOptions" in source, command


@pytest.mark.parametrize("command", ["evaluate", "index", "steer", "inspect"])
def test_commands_refuse_a_device_that_is_not_there(command: str, folder: Path, capsys: Any) -> None:
    save(small_sae(ActivationCache(folder / "cache")), folder / "run", {"hook_name": HOOK})
    options = ["--latent", "1", "--prompt", "x"] if command == "steer" else ["--cache", str(folder / "cache")]
    with pytest.raises(SystemExit) as error:
        main([command, str(folder / "run"), *options, "--device", "abacus"])
    assert error.value.code == 2
    assert "device 'abacus' is not available here" in " ".join(capsys.readouterr().err.split())
