"""`saelab plan`: its arithmetic against numbers worked out by hand, its traffic against what a run sends."""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.distributed.plan import Machine, Work, collectives, layouts, plan, traffic_per_step
from saelab.distributed.sharding import build_shard
from saelab.distributed.world import end_world, start_world
from saelab.training import TrainConfig, train_steps
from tests.processes import run_processes

MILLION = Work()  # the defaults: 2**20 latents of width 4096, 64 of them for each of 131,072 tokens


def test_traffic_by_hand() -> None:
    # 4 data ranks: a ring sends 2 * 3/4 of the gradient: W_enc and W_dec (2 * 10 * 8), b_enc (10), b_dec (8), 4 B each.
    assert traffic_per_step(16, 8, 10, 3, data_size=4)["gradients"] == 1.5 * 4 * 178
    # 2 dictionary ranks of 5 latents: 16 tokens x 3 candidates x 8 B; the reconstruction of 16 x 8 floats once over.
    split = traffic_per_step(16, 8, 10, 3, dict_size=2)
    assert split == {"gradients": 0, "candidates": 16 * 3 * 8, "reconstruction": 4 * 16 * 8, "bias": 4 * 8}
    assert not any(traffic_per_step(16, 8, 10, 3).values())
    # Divided parameters are gathered once and their gradients summed once, which together is one all-reduce.
    work = Work(8, 10, 3, 16)
    sent = [
        sum(one.sent(4) for one in collectives(replace(work, placement=where), 4, 1))  # pyright: ignore
        for where in ("replicated", "sharded")
    ]
    assert sent[0] == sent[1] == 1.5 * (4 * 178 + 10)


def test_a_million_latents_by_hand() -> None:
    machine = Machine(matmul_tflops=500, memory_tbs=2, fast_gbs=100, slow_gbs=10, feed_gbs=20)
    eight = plan(MILLION, 8, 8, machine)
    weights, row = 2 * 2**17 * 4096, 2 * 4096
    assert eight.memory_gb["weights and gradients (fp32)"] == pytest.approx(8 * weights / 1e9, rel=1e-3)
    assert eight.memory_gb["moments (fp32)"] == pytest.approx(8 * weights / 1e9, rel=1e-3)
    assert eight.seconds["encode"] == pytest.approx(2 * 131_072 * 4096 * 2**17 / 500e12)
    assert eight.seconds["reconstruction exchange"] == pytest.approx(2 * 7 / 8 * 4 * 131_072 * 4096 / 100e9, rel=1e-3)
    assert eight.limit == "arithmetic" and eight.bottleneck == "encode"
    assert eight.feed_seconds == pytest.approx(131_072 * row / 20e9)
    assert eight.checkpoint_gb == pytest.approx(12 * 8 * weights / 1e9, rel=1e-3)
    assert plan(MILLION, 64, 64, machine).seconds["candidates exchange"] == pytest.approx(63 * 131_072 * 64 * 8 / 10e9)
    half = plan(replace(MILLION, moments="bf16"), 8, 8, machine)
    assert half.memory_gb["moments (bf16)"] == eight.memory_gb["moments (fp32)"] / 2
    assert half.checkpoint_gb == pytest.approx(eight.checkpoint_gb * 8 / 12)
    assert eight.seconds["Adam and constraints"] / half.seconds["Adam and constraints"] == pytest.approx(50 / 42)


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"matmul_tflops": 10.0}, "arithmetic"),
        ({"memory_tbs": 0.1}, "memory"),
        ({"fast_gbs": 1.0}, "network"),
        ({"feed_gbs": 0.1}, "feed"),
    ],
)
def test_the_limit_is_what_is_slow(change: dict[str, float], limit: str) -> None:
    one = plan(MILLION, 8, 8, replace(Machine(), **change))  # pyright: ignore
    assert one.limit == limit
    assert one.step_seconds == max(sum(one.seconds.values()), one.feed_seconds)
    assert one.device_hours(1e9) == pytest.approx(8 * 1e9 / 131_072 * one.step_seconds / 3600)


def test_dead_latents_cost_memory_time_and_traffic() -> None:
    alive, dead = (plan(replace(MILLION, dead=share), 8, 4, Machine()) for share in (0.0, 0.1))
    assert dead.traffic_mb["AuxK"] > 0 and "AuxK" not in alive.traffic_mb
    assert dead.seconds["AuxK"] > 0.1 * dead.seconds["encode"] and "AuxK" not in alive.seconds
    assert dead.total_memory_gb > alive.total_memory_gb


def test_layouts_that_fit_come_first_and_divide() -> None:
    found = layouts(MILLION, 8, Machine())
    assert {(p.data_size, p.dict_size) for p in found} == {(8, 1), (4, 2), (2, 4), (1, 8)}
    assert found[0].total_memory_gb <= 80 < found[-1].total_memory_gb
    assert layouts(Work(8, 3, 2, 4), 8, Machine()) == []


def test_the_command(capsys: pytest.CaptureFixture) -> None:
    main(["plan", "--json", "--price", "2", "--tokens", "1e9"])
    plans = json.loads(capsys.readouterr().out)
    assert [p["gpus"] for p in plans] == [2**i for i in range(10)] and not plans[0]["fits"]
    assert plans[3]["bottleneck"] == "encode" and plans[3]["price"] == pytest.approx(2 * plans[3]["device_hours"])
    assert shlex.split(plans[3]["torchrun"])[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "saelab"]
    assert "--nnodes 2" in plans[4]["torchrun"] and plans[0]["torchrun"].startswith("saelab train ")
    queued = shlex.split(plans[4]["sbatch"])
    assert queued[:3] == ["sbatch", "--nodes", "2"] and shlex.split(queued[-1])[:2] == ["srun", "torchrun"]
    main(["plan", "--d-sae", "16384", "--d-in", "768", "--gpus", "1", "8", "--parts"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("tokens/s", "not measured", "Tflop/s", "GB: moments (fp32)", "srun torchrun"))
    assert "longer than the" not in said
    main(["plan", "--gpus", "8", "--checkpoint-minutes", "0.5"])
    assert "longer than the 0.5 between two" in capsys.readouterr().out.replace("\n", " ")
    for wrong in (
        *(["--gpus", "0"], ["--gpus"], ["--matmul-tflops", "0"], ["--slow-gbs", "-1"], ["--memory-tbs", "nan"]),
        *(["--dead", "2"], ["--k", "0"], ["--tokens", "inf"], ["--price", "-1"], ["--gpus", "7"]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["plan", *wrong])
        assert caught.value.code == 2


def test_the_table_of_the_how_to_is_what_plan_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "many-gpus.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 7]
    for gpus, layout, memory, sent, time, tokens, limit in rows[1:]:
        best = layouts(MILLION, int(gpus), Machine())[0]
        assert layout == f"{best.data_size} x {best.dict_size}"
        assert memory == f"{best.total_memory_gb:.1f} GB"
        assert sent == f"{sum(best.traffic_mb.values()):,.0f} MB"
        assert time == f"{1e3 * best.step_seconds:.0f} ms"
        assert tokens == f"{best.tokens_per_second:,.0f}"
        assert limit == f"{best.limit}: {best.bottleneck}"
    assert len(rows) == 4


D_IN, D_SAE, K, BATCH, K_AUX = 64, 512, 2, 256, 16
OPS = {
    "all_reduce": "all_reduce",
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
}
LARGER_IS_SECOND = {"_reduce_scatter_base_"}  # what goes in; of a gathering, and where both are equal, the first


class Bytes(CommDebugMode):
    """Torch's counter of collective operations, which adds up their bytes too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = sum(self.get_comm_counts().values())
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if sum(self.get_comm_counts().values()) > before:
            name = func._overloadpacket.__name__
            side = result if name == "all_gather_into_tensor" else args[name in LARGER_IS_SECOND]
            self.bytes[OPS.get(name, name)] += sum(t.numel() * t.element_size() for t in tensors(side))
        return result


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for one in value for tensor in tensors(one)] if isinstance(value, list | tuple) else []


def count(rank: int, port: int, folder: str) -> None:
    """One process of four: the bytes of one step in every layout, without and with dead latents."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cache = ActivationCache(Path(folder) / "cache")
    for dict_ranks in (1, 2, 4):
        cases = [("topk", 10**9), ("topk", BATCH), ("batch_topk", 10**9), ("feature_choice", 10**9)]
        parallel = start_world(dict_ranks, timeout_s=300)
        for variant, dead_after in cases if dict_ranks < 4 else cases[:3]:
            options = {"mutual_share": 0, "zipf_weight": 0.0} if variant == "feature_choice" else {}
            sae = build_shard(variant, D_IN, D_SAE, 0, parallel, k=K, **options)
            config = TrainConfig(epochs=1, batch_size=BATCH, dead_after=dead_after, k_aux=K_AUX, lr=1e-3)
            steps = train_steps(sae, cache, config, parallel=parallel)
            next(steps)
            with Bytes() as mode:
                next(steps)
            steps.close()
            name = f"{rank}-{dict_ranks}-{variant}-{dead_after == BATCH}.json"
            (Path(folder) / name).write_text(json.dumps([mode.bytes, mode.get_total_counts()]))
    end_world()


@pytest.mark.slow
def test_planned_bytes_are_those_that_torch_counts(tmp_path: Path) -> None:
    """By kind of collective, on gloo, within 2 %."""
    acts = torch.randn(4 * BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    ActivationCache.from_tensors(tmp_path / "cache", acts, held_out=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(count, (port, str(tmp_path)), 4)
    for path in sorted(tmp_path.glob("*.json")):
        _, ranks, variant, dead = path.stem.split("-")
        work = Work(D_IN, D_SAE, K, BATCH, k_aux=K_AUX, dead=0.3 if dead == "True" else 0.0)
        budgets = {"batch_topk": "batch", "feature_choice": "latent"}
        work = replace(work, budget=budgets.get(variant, "token"))  # pyright: ignore[reportArgumentType]
        planned: dict[str, float] = defaultdict(float)
        for one in collectives(work, 4 // int(ranks), int(ranks)):
            planned[one.op] += one.size
        counted, number = json.loads(path.read_text())
        assert number > 0, path
        for op in planned.keys() | counted.keys():
            off = abs(planned[op] - counted.get(op, 0))
            assert off <= max(0.02 * planned[op], 256), (path.stem, op, planned[op], counted)
    assert len(list(tmp_path.glob("*.json"))) == 44
