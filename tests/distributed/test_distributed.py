"""Many processes (gloo, on a CPU) do what one does: same weights, same metrics, same files, and they fail together."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saelab.bench import distributed as bench
from saelab.data.cache import ActivationCache
from saelab.distributed import SINGLE, Parallel, start_world
from saelab.distributed.checkpoint import slices, split_dims
from saelab.distributed.plan import traffic_per_step
from saelab.distributed.sharding import build_shard
from saelab.distributed.world import end_world
from saelab.errors import UserError
from saelab.layout import EXTRA
from saelab.sae import build, mutual_choice
from saelab.sae.parts import in_parts
from saelab.sae.topk import TopK
from saelab.sae.weights import load_sae
from saelab.training import TrainConfig, fit_steps, n_steps
from saelab.training.checkpoints import latest_step, load_step
from tests.processes import run_processes

D_IN, D_SAE, K = 16, 64, 2
CONFIG = TrainConfig(epochs=2, batch_size=64, lr=3e-3, dead_after=70, k_aux=4, ema=0.9, grad_clip=0.05)
# What is trained, processes, and dictionary ranks among them.
DIVIDED = [("topk", 4, 2), ("batch_topk", 4, 2), ("feature_choice", 4, 2), ("topk", 2, 2), ("abs_topk", 2, 2)]
BY_DATA = [(name, 2, 1) for name in ("topk", "batch_topk", "mutual_choice", "feature_choice", "gradient_topk")]
BY_DATA += [
    (name, 2, 1) for name in ("relu", "gated", "jump_relu", "matching_pursuit", "matryoshka", "random_prefixes")
]
CASES = [*DIVIDED, *BY_DATA]
REVIVES = {"topk", "abs_topk", "batch_topk", "mutual_choice", "feature_choice"}  # in so short a run
# In which a rounding can tip two latents of 64: a choice, or a threshold whose gradient is as small as its rounding.
CHOOSERS = {"batch_topk", "mutual_choice", "feature_choice", "jump_relu"}
RESUMED = {"topk": 7, "feature_choice": 15}  # interrupted after so many of 24 steps
UNEVEN = 65  # latents, which two data ranks divide into 33 and 32
REFIT = 5  # steps between fits of the Zipf law, so that a short run has some
# Of those with another one than k, or of another variant than their name.
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"target_l0": 26, "adapt_rate": 0.1},  # between the L0 of two parts of a batch at some steps
    "gated": {"l0": 26},  # so near that the controller goes by how near it is
    "jump_relu": {"target_l0": 8, "bandwidth": 0.5, "penalty_warmup": 0.0},  # a kernel so wide that the penalty acts
    "matching_pursuit": {"n_steps": 1, "norm": "project", "revive_weight": 1.0},  # so few steps leave atoms silent
    "random_prefixes": {"variant": "matryoshka", "k": K, "random_prefixes": 3},
}


def tune_into(folder: Path, cache_path: str, parallel: Parallel) -> None:
    """Fine-tune one SAE, in shards where it is split."""
    torch.manual_seed(7)
    whole = build("topk", D_IN, D_SAE, k=K)
    sae = build_shard("topk", D_IN, D_SAE, 0, parallel, k=K)
    sae.load_state_dict(slices(whole.state_dict(), split_dims(sae.state_dict(), whole.state_dict()), parallel))
    cache = ActivationCache(cache_path)
    for _ in fit_steps(sae, cache, CONFIG, folder, source="theirs", parallel=parallel):
        pass


def train_into(
    folder: Path, cache_path: str, variant: str, parallel: Parallel, stop: int | None = None, d_sae: int = D_SAE
) -> None:
    cache = ActivationCache(cache_path)
    sae = build_shard(
        **{"variant": variant, **OPTIONS.get(variant, {"k": K})}, d_in=D_IN, d_sae=d_sae, seed=0, parallel=parallel
    )
    config = replace(CONFIG, aux_gradient="straight_through") if variant == "topk" else CONFIG
    generator = fit_steps(sae, cache, config, folder, resume=True, checkpoint_steps=5, parallel=parallel)
    for metrics in generator:
        rows = -(-sae.d_sae // parallel.data_size)  # of the last data rank, maybe fewer
        assert sae.W_dec.shape[0] == min(rows, sae.d_sae - rows * parallel.data_rank), "the weights are not divided"
        if metrics.step == stop:
            generator.close()
    assert sae.W_dec.shape[0] == sae.d_sae


def keep_marks(folder: Path, cache_path: str, parallel: Parallel) -> list[int]:
    """Buffers of a variant that nobody knows, one number per latent, after a run was stopped and resumed."""

    class Marked(TopK, variant="marked"):
        marks: torch.Tensor

        def __init__(self, d_in: int, d_sae: int, k: int = 2) -> None:
            super().__init__(d_in, d_sae, k)
            self.register_buffer("marks", torch.zeros(d_sae, dtype=torch.int64))

    cache = ActivationCache(cache_path)
    shards = [build_shard("marked", D_IN, D_SAE, 0, parallel, k=K) for _ in range(2)]
    shards[0].marks.copy_(torch.arange(D_SAE)[parallel.latents(D_SAE)])  # pyright: ignore
    for sae, resume in zip(shards, (False, True)):
        steps = fit_steps(sae, cache, CONFIG, folder, resume=resume, parallel=parallel)
        next(steps)
        steps.close()
    return shards[1].marks.tolist()  # pyright: ignore


def worker(rank: int, ports: list[int], folder: str, cache_path: str) -> None:
    """All that four processes are asked, and then two of them, in one start."""
    root, mutual_choice.REFIT = Path(folder), REFIT
    enter(rank, 4, ports[0])
    for variant, size, dict_ranks in CASES:
        if size == 4:
            train_case(root, cache_path, variant, dict_ranks, rank)
    parallel = start_world(2, timeout_s=300)
    train_into(root / "stopped", cache_path, "topk", parallel, stop=7)
    parallel.barrier()
    if rank == 0:
        for name in ("again", "by-two", "by-one"):
            shutil.copytree(root / "stopped", root / name)
    parallel.barrier()
    train_into(root / "again", cache_path, "topk", parallel)
    train_into(root / "feature_choice-resumed", cache_path, "feature_choice", start_world(2, timeout_s=300))
    (root / f"marks-{rank}.json").write_text(json.dumps(keep_marks(root / "marked", cache_path, start_world(4))))
    (root / f"refused-{rank}.txt").write_text(refused(root, cache_path, start_world(2), rank))
    end_world()
    if rank < 2:
        enter(rank, 2, ports[1])
        for variant, size, dict_ranks in CASES:
            if size == 2:
                train_case(root, cache_path, variant, dict_ranks, rank)
        for name in ("by-two", "topk-resumed"):
            train_into(root / name, cache_path, "topk", start_world(1, timeout_s=300))
        train_into(root / "uneven", cache_path, "topk", start_world(1, timeout_s=300), stop=7, d_sae=UNEVEN)
        tune_into(root / "tuned-2", cache_path, start_world(2, timeout_s=300))


def enter(rank: int, world: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def train_case(root: Path, cache_path: str, variant: str, dict_ranks: int, rank: int) -> None:
    parallel = start_world(dict_ranks, timeout_s=300)
    name = f"{variant}-{parallel.size}-{dict_ranks}"
    train_into(root / name, cache_path, variant, parallel)
    (root / f"traffic-{name}-{rank}.json").write_text(json.dumps(parallel.traffic))


def refused(root: Path, cache_path: str, parallel: Parallel, rank: int) -> str:
    """What processes are told of which one reads other activations."""
    cache = ActivationCache(cache_path)
    if rank == 3:
        acts = cache.read(range(cache.n_rows)).acts
        cache = ActivationCache.from_tensors(root / "other", acts + 1, held_out=0.1)
    with pytest.raises(UserError) as error:
        list(
            fit_steps(build_shard("topk", D_IN, D_SAE, 0, parallel, k=K), cache, CONFIG, root / "no", parallel=parallel)
        )
    return str(error.value)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(900, 32, generator=generator) * (torch.rand(900, 32, generator=generator) < 0.1)
    acts = 5 * codes @ torch.randn(32, D_IN, generator=generator) + 3
    folder = tmp_path_factory.mktemp("distributed") / "cache"
    return ActivationCache.from_tensors(folder, acts, grads=acts.roll(1, 0) - acts, held_out=0.1, shard_rows=300)


@pytest.fixture(scope="module")
def runs(cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that four processes and one have written."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mutual_choice, "REFIT", REFIT)
        patch.setenv("SAELAB_KERNELS", "reference")  # also for the processes: theirs would each be compiled anew
        for variant in {variant for variant, *_ in CASES}:
            train_into(root / f"{variant}-single", cache.path, variant, SINGLE)
        for variant, step in RESUMED.items():
            train_into(root / f"{variant}-resumed", cache.path, variant, SINGLE, stop=step)
        shutil.copytree(root / "topk-resumed", root / "stopped-single")
        tune_into(root / "tuned-single", cache.path, SINGLE)
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            ports = [first.getsockname()[1], second.getsockname()[1]]
        run_processes(worker, (ports, str(root), cache.path), 4)
        train_into(root / "by-one", cache.path, "topk", SINGLE)
        for name in ("uneven", "uneven-single"):
            train_into(root / name, cache.path, "topk", SINGLE, d_sae=UNEVEN)
    return root


def compare(left: Path, right: Path, tipped: int = 0) -> None:
    """Equal up to the order of float32 sums.

    Adam divides a gradient by its own size, so that where it is as small as its rounding error a weight may move
    the other way: by at most twice the learning rate a step, and only at few places: 1 % of the weights, and as many
    latents as are said to be ``tipped``.
    """
    a, b = load_file(left / "sae_weights.safetensors"), load_file(right / "sae_weights.safetensors")
    assert set(a) == set(b)
    for name in a:
        error = (a[name] - b[name]).abs() / b[name].abs().clamp_min(1.0)  # thresholds are of the order of 10
        usual = error if error.ndim != 1 else error.sort().values[: error.numel() - tipped]
        assert usual.quantile(0.99) < 2e-5, f"{name}: {usual.quantile(0.99)}"
        assert error.max() < 2 * CONFIG.rate, f"{name}: {error.max()}"
    for one, two in zip(*((p / "metrics.jsonl").read_text().splitlines() for p in (left, right)), strict=True):
        one, two = json.loads(one), json.loads(two)
        assert one.keys() == two.keys()
        assert one["dead"] == pytest.approx(two["dead"], abs=1)
        moved = tipped * 2 * CONFIG.rate * one["step"] / D_SAE  # of a mean over latents
        for name in one.keys() - {"dead"}:
            least = moved if name == "threshold" else 1e-6
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=least), name
    assert (left / "run.json").read_text() == (right / "run.json").read_text()
    assert (left / "cfg.json").read_text() == (right / "cfg.json").read_text()


def test_several_processes_are_refused_on_a_device_that_has_no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes train on cpu or cuda, not on mps"):
        start_world(device="mps")


@pytest.mark.parametrize(("variant", "size", "dict_ranks"), CASES)
def test_many_processes_train_the_sae_of_one(runs: Path, variant: str, size: int, dict_ranks: int) -> None:
    compare(runs / f"{variant}-{size}-{dict_ranks}", runs / f"{variant}-single", 2 * (variant in CHOOSERS))
    rows = [json.loads(line) for line in (runs / f"{variant}-single" / "metrics.jsonl").read_text().splitlines()]
    if variant in REVIVES:
        assert any("auxk" in row and row["dead"] > 4 for row in rows), "the auxiliary loss was not put to the test"
    if variant == "matching_pursuit":
        assert any("revive" in row for row in rows), "no silent atom was put to the test"
    assert any(row["grad_norm"] > CONFIG.grad_clip for row in rows)


def newest(folder: Path) -> Path:
    path = latest_step(folder)
    assert path is not None
    return path


def test_they_select_the_same_latents(runs: Path) -> None:
    kept = [newest(runs / name) for name in ("stopped", "stopped-single")]
    assert [path.name for path in kept] == ["step_00000007"] * 2
    assert in_parts(kept[0]) and not in_parts(kept[1])
    sae = build("topk", D_IN, D_SAE, k=K)
    (weights, state, scalars), (their_weights, their_state, their_scalars) = (load_step(path, sae) for path in kept)
    assert scalars == their_scalars and state.keys() == their_state.keys()
    assert torch.equal(state["tokens_since_fired"], their_state["tokens_since_fired"])
    # Seven steps of at most lr, along gradients that are sums over the 64 tokens of a batch.
    bound = 7 * CONFIG.rate * 64 * torch.finfo(torch.float32).eps * 10
    for name, weight in weights.items():
        assert (weight - their_weights[name]).abs().quantile(0.99) < bound, name
    assert torch.equal(load_sae(kept[0]).W_dec, weights["W_dec"])  # a checkpoint in parts opens like another


@pytest.mark.parametrize("folder", ["by-two", "by-one", *(f"{variant}-resumed" for variant in RESUMED)])
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, folder: str) -> None:
    variant = folder.split("-")[0] if folder.split("-")[0] in RESUMED else "topk"
    compare(runs / folder, runs / f"{variant}-single", 2 * (variant in CHOOSERS))
    assert load_sae(runs / folder).d_sae == D_SAE


def test_latents_that_do_not_divide_evenly_are_held_and_saved(runs: Path) -> None:
    compare(runs / "uneven", runs / "uneven-single")


def test_a_resumed_run_of_the_same_layout_is_identical(runs: Path) -> None:
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        assert (runs / "again" / name).read_bytes() == (runs / "topk-4-2" / name).read_bytes()


def test_a_checkpoint_without_one_of_its_files_is_refused(runs: Path, tmp_path: Path) -> None:
    step = shutil.copytree(newest(runs / "stopped"), tmp_path / "step_00000007")
    sorted(step.glob("shard-*"))[1].unlink()
    with pytest.raises(UserError, match="lacks a part of"):
        load_step(step, build("topk", D_IN, D_SAE, k=K))


def test_processes_with_different_caches_are_refused(runs: Path) -> None:
    told = {(runs / f"refused-{rank}.txt").read_text() for rank in range(4)}
    assert told == {"the cache differs between process 0 and process 3; give every process the same files"}


def test_a_fine_tuning_is_split_like_a_training(runs: Path) -> None:
    compare(runs / "tuned-2", runs / "tuned-single")


@pytest.mark.parametrize("layout", ["4-2", "2-1"])
def test_latents_choose_alike_in_parts_and_alone(runs: Path, layout: str) -> None:
    one, parts = (load_file(runs / f"feature_choice-{n}" / EXTRA) for n in ("single", layout))
    assert one.keys() == parts.keys() and one["switched"] == parts["switched"] == 12
    assert one["zipf"][1] > 0, "no law was fitted"
    for name in one:
        # Where the order of a sum tips a choice, one count in a batch of 64 differs.
        error = (one[name] - parts[name]).double().abs().flatten().sort().values
        usual = error[:-2] if error.numel() == D_SAE else error
        assert usual.max() <= 1e-4 * one[name].abs().max(), name


@pytest.mark.parametrize(("variant", "size", "dict_ranks"), [*DIVIDED[:2], *DIVIDED[3:], BY_DATA[0]])  # one AuxK term
def test_traffic_is_what_the_formula_says(
    runs: Path, cache: ActivationCache, variant: str, size: int, dict_ranks: int
) -> None:
    sent = json.loads((runs / f"traffic-{variant}-{size}-{dict_ranks}-0.json").read_text())
    steps = n_steps(cache, CONFIG)
    expected = traffic_per_step(64, D_IN, D_SAE, K, data_size=size // dict_ranks, dict_size=dict_ranks)
    assert sent.get("gradients", 0) == pytest.approx(steps * expected["gradients"], abs=4 * steps)
    assert sent.get("bias", 0) == pytest.approx(steps * expected["bias"], abs=steps)
    # AuxK exchanges its own candidates and a second reconstruction while latents are dead.
    rows = [json.loads(line) for line in (runs / f"{variant}-single" / "metrics.jsonl").read_text().splitlines()]
    aux = sum("auxk" in row for row in rows)
    assert sent.get("reconstruction", 0) == pytest.approx((steps + aux) * expected["reconstruction"], abs=steps)
    spent = 0 if variant in CHOOSERS else steps  # budgets of a batch or a latent are spent without candidates
    assert sent.get("candidates", 0) >= spent * expected["candidates"]
    assert sent.get("candidates", 0) <= (spent + aux * CONFIG.k_aux / K) * expected["candidates"] + steps


def test_every_rank_keeps_its_own_values_of_a_buffer_per_latent(runs: Path) -> None:
    marks = [json.loads((runs / f"marks-{rank}.json").read_text()) for rank in range(4)]
    assert marks == torch.arange(D_SAE).view(4, -1).tolist()


@pytest.mark.parametrize("variant", ["abs_topk", "batch_topk", "mutual_choice", "feature_choice"])
def test_what_is_split_follows_from_the_shapes(variant: str) -> None:
    sae, whole = (build(variant, D_IN, d_sae, k=K).state_dict() for d_sae in (D_SAE // 4, D_SAE))
    expected = {"W_dec": 0, "W_enc": 1, "b_enc": 0}
    if variant in {"mutual_choice", "feature_choice"}:
        expected |= {"density.total": 0, "density.weight": 0}
    if variant == "feature_choice":
        expected |= {"rates": 0, "latent_threshold.total": 0, "latent_threshold.weight": 0}
    assert split_dims(sae, whole) == expected


def test_a_shard_starts_as_its_part_of_the_whole() -> None:
    torch.manual_seed(5)
    for d_in, d_sae in ((24, 64), (1000, 1200), (1001, 1100)):  # the last two need several blocks
        whole = build_shard("topk", d_in, d_sae, 5, SINGLE, k=3)
        for rank in range(4):
            parallel = Parallel(dict_size=4, dict_rank=rank)
            shard = build_shard("topk", d_in, d_sae, 5, parallel, k=3)
            assert torch.equal(shard.W_dec, whole.W_dec[parallel.latents(d_sae)])
            assert torch.equal(shard.W_enc, whole.W_enc[:, parallel.latents(d_sae)])


@pytest.mark.parametrize(
    ("variant", "d_sae", "config", "message"),
    [
        ("matryoshka", 128, {"k": 3}, "matryoshka cannot be split over dictionary ranks"),
        ("relu", 64, {}, "relu cannot be split"),
        ("topk", 64, {"k": 3, "match_norm": True}, "topk with match_norm=True cannot be split"),
        ("topk", 62, {"k": 3}, "d_sae=62 does not divide over 4 dictionary ranks"),
        ("topk", 64, {"k": 17}, "k=17 exceeds the 16 latents of a rank"),
        ("topk", 64, {"k": 8, "k_warmup": 0.5}, "k_warmup begins at 4 k = 32, which exceeds the 16 latents"),
    ],
)
def test_impossible_splits_are_refused(variant: str, d_sae: int, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_shard(variant, D_IN, d_sae, 0, Parallel(dict_size=4), **config)


def test_the_benchmark_counts_what_the_formula_says(tmp_path: Path) -> None:
    options = bench.Options(d_in=32, d_sae=64, k=4, batch_size=64, steps=2, processes=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # see runs(), also for the kernels
        patch.setenv("SAELAB_KERNELS", "reference")
        results = bench.measure(options, tmp_path)
    assert [result["dict_ranks"] for result in results] == [1, 2]
    for result in results:
        for purpose, formula in result["formula"].items():
            assert result["counted"].get(purpose, 0) == pytest.approx(formula, abs=4), purpose
        # The interface also carries headers, and whatever else runs on the machine.
        assert result["wire"] > sum(result["formula"].values())
    assert bench.table(results, 2).row_count > len(results)
