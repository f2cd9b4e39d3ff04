"""What training a large SAE on many devices takes, from formulas: memory, traffic, time per step, and the limit.

`saelab plan` prints it. The bytes of every collective operation are tested against those that a run sends; times are
those bytes, operations and passes over memory divided by the rates of a :class:`Machine`, which are assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from saelab.kernels.products import DEVICE_CHUNK_BYTES
from saelab.sae.share import DIGIT, DIGIT_OF_MANY, KEY_BITS

Op = Literal["all_reduce", "all_gather", "reduce_scatter"]
# How parameters lie on the ranks that share a batch: whole on each, or divided (torch's `fully_shard`).
Placement = Literal["replicated", "sharded"]
PLACEMENT: Placement = "sharded"  # of this version's engine
Limit = Literal["arithmetic", "memory", "network", "feed"]


@dataclass(frozen=True)
class Work:
    """What is trained, and how."""

    d_in: int = 4096
    """Width of the activations."""
    d_sae: int = 2**20
    """Latents."""
    k: int = 64
    """Latents per token."""
    batch_size: int = 131_072
    """Tokens per step, over all devices."""
    d_out: int | None = None
    """Width of the target of a transcoder; by default that of the activations."""
    k_aux: int | None = None
    """Dead latents per token in the AuxK loss; by default what `saelab train` takes."""
    dead: float = 0.0
    """Share of the latents that is dead, 0 to 1; with 0 the AuxK loss costs nothing."""
    budget: Literal["token", "batch", "latent"] = "token"
    """What the budget of latents is spent over: token (topk), batch (batch_topk) or latent (feature_choice)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the matrix products; bf16 needs a copy of the matrices."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Of the optimizer's two moments."""
    cache_bytes: int = 2
    """Bytes of a number in the cache."""
    placement: Placement = PLACEMENT
    """How parameters lie on devices that share the batch; by default as this version has them."""

    @property
    def out(self) -> int:
        """Width of what is reconstructed."""
        return self.d_in if self.d_out is None else self.d_out

    def parameters(self, dict_size: int = 1) -> float:
        """Numbers in the weights of one dictionary rank."""
        return self.d_sae / dict_size * (self.d_in + self.out + 1) + self.out

    def dead_candidates(self) -> float:
        """Latents per token that AuxK takes; 0 where none is dead."""
        usual = 2 ** round(math.log2(max(self.out / 2, 1)))  # as saelab.training.TrainConfig resolves it
        return min(usual if self.k_aux is None else self.k_aux, self.dead * self.d_sae)


@dataclass(frozen=True)
class Collective:
    """One collective operation of a step. ``size`` is in bytes: of the result of a gathering, else of what goes in."""

    purpose: str
    op: Op
    over: Literal["data", "dictionary", "all"]
    size: float

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a ring."""
        return (2 if self.op == "all_reduce" else 1) * (ranks - 1) / ranks * self.size

    def ranks(self, data_size: int, dict_size: int) -> int:
        """How many processes take part, in a layout of so many."""
        return {"data": data_size, "dictionary": dict_size, "all": data_size * dict_size}[self.over]


def collectives(work: Work, data_size: int, dict_size: int) -> list[Collective]:
    """The collective operations of one rank and step. Left out are those of a few numbers: losses, norms, counts."""
    tokens, latents, found = work.batch_size / data_size, work.d_sae / dict_size, []
    aux, weights = work.dead_candidates(), 4 * work.parameters(dict_size)
    if data_size > 1:
        if work.placement == "sharded":
            found += [
                Collective("weights", "all_gather", "data", weights),
                Collective("gradients", "reduce_scatter", "data", weights),
            ]
        else:
            found.append(Collective("gradients", "all_reduce", "data", weights))
        found.append(Collective("firing", "all_reduce", "data", latents))
    if dict_size > 1:
        if work.budget == "token":  # a value and the number of its latent
            found.append(Collective("candidates", "all_gather", "dictionary", dict_size * tokens * 8 * work.k))
        found.append(Collective("reconstruction", "all_reduce", "dictionary", 4 * tokens * work.out))
        found.append(Collective("bias", "all_reduce", "dictionary", 4 * work.d_in))
    if aux and dict_size > 1:
        found.append(Collective("AuxK", "all_gather", "dictionary", dict_size * tokens * 8 * aux))
        found.append(Collective("AuxK", "all_reduce", "dictionary", 4 * tokens * work.out))
    if aux and data_size > 1:
        found.append(Collective("AuxK", "all_reduce", "data", 4 * (work.out + 1)))
    return found + _spending(work, data_size, dict_size)


def _spending(work: Work, data_size: int, dict_size: int) -> list[Collective]:
    """How a budget that is not a token's is spent: counts by digit (:mod:`saelab.sae.share`), and statistics."""
    latents, found = work.d_sae / dict_size, []
    if work.budget == "batch" and data_size * dict_size > 1:
        found.append(Collective("budget", "all_reduce", "all", -(-KEY_BITS // DIGIT) * 4 * 2**DIGIT))
    if work.budget == "latent" and data_size > 1:
        counts = -(-KEY_BITS // DIGIT_OF_MANY) * 4 * 2**DIGIT_OF_MANY
        # Firing counts in 8 bytes, the least value of each latent, and five averages in float64.
        found.append(Collective("budget", "all_reduce", "data", latents * (counts + 8 + 4 + 5 * 8)))
    if work.budget == "latent" and dict_size > 1:  # the rates of all latents
        found.append(Collective("budget", "all_gather", "dictionary", 8 * work.d_sae))
    return found


def traffic_per_step(n: int, d_in: int, d_sae: int, k: int, data_size: int = 1, dict_size: int = 1) -> dict[str, float]:
    """Bytes that one rank sends per step, by purpose, for ``n`` tokens in the whole batch and no dead latent.

    An all-reduce of ``B`` bytes over ``R`` ranks sends ``2 (R - 1) / R B`` from each (ring), an all-gather of ``B``
    bytes from each ``(R - 1) B``. Scalars and firing flags are left out.
    """
    work = Work(d_in, d_sae, k, n)
    found = {"gradients": 0.0, "candidates": 0.0, "reconstruction": 0.0, "bias": 0.0}
    for one in collectives(work, data_size, dict_size):
        if one.purpose != "firing":
            # The weights' gathering and the gradients' scattering are the two halves of one all-reduce.
            purpose = "gradients" if one.purpose == "weights" else one.purpose
            found[purpose] += one.sent(one.ranks(data_size, dict_size))
    return found


@dataclass(frozen=True)
class Machine:
    """A device and what it is connected to, as sustained rates.

    The defaults are data-sheet figures of H100 SXM nodes of 8 with 400 Gbit/s per GPU between them, with usual
    efficiencies. They are not measurements of this code.
    """

    matmul_tflops: float = 600.0
    """bf16 matrix products, 1e12 operations a second; fp32 (TF32) ones take twice as long."""
    memory_tbs: float = 2.8
    """Device memory, 1e12 bytes a second."""
    memory_gb: float = 80.0
    """Device memory, 1e9 bytes."""
    node: int = 8
    """Devices joined by the fast link, in one machine."""
    fast_gbs: float = 350.0
    """Within a node, 1e9 bytes a second sent by each device."""
    slow_gbs: float = 40.0
    """Between nodes, 1e9 bytes a second sent by each device."""
    feed_gbs: float = 6.0
    """Reading the cache, 1e9 bytes a second for each node: a local NVMe disk, or the network to a shared one."""
    host_gbs: float = 25.0
    """From a node's memory to a device, 1e9 bytes a second for each device."""
    write_gbs: float = 2.0
    """Writing checkpoints, 1e9 bytes a second for each node."""
    price: float = 0.0
    """Of a device for one hour, in your currency."""


@dataclass(frozen=True)
class Plan:
    """One layout of a run, per device and step."""

    gpus: int
    data_size: int
    dict_size: int
    memory_gb: dict[str, float]
    traffic_mb: dict[str, float]
    read_mb: float  # of the cache, by a node
    checkpoint_gb: float  # all of it
    seconds: dict[str, float]  # of the parts, one after the other
    feed_seconds: float  # of reading a step's rows, which goes on meanwhile
    checkpoint_seconds: float  # of writing a checkpoint, which goes on meanwhile
    batch_size: int

    @property
    def total_memory_gb(self) -> float:
        return sum(self.memory_gb.values())

    @property
    def step_seconds(self) -> float:
        """Of a step, at least as long as reading its rows takes."""
        return max(sum(self.seconds.values()), self.feed_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size / self.step_seconds

    @property
    def limit(self) -> Limit:
        """What the parts of a step that take longest together wait for."""
        if self.feed_seconds > sum(self.seconds.values()):
            return "feed"
        kinds: dict[Limit, float] = {}
        for part, seconds in self.seconds.items():
            kinds[KINDS[part]] = kinds.get(KINDS[part], 0.0) + seconds
        return max(kinds, key=lambda kind: kinds[kind])

    @property
    def bottleneck(self) -> str:
        """The part of a step that takes longest, of those that are limited so."""
        parts = {part: seconds for part, seconds in self.seconds.items() if KINDS[part] == self.limit}
        if self.limit == "feed":
            parts["reading the cache"] = self.feed_seconds
        return max(parts, key=lambda part: parts[part])

    def device_hours(self, tokens: float) -> float:
        """For training on so many tokens."""
        return self.gpus * tokens / self.tokens_per_second / 3600


KINDS: dict[str, Limit] = {
    "encode": "arithmetic",
    "select": "memory",
    "decode and gradient rows": "memory",
    "AuxK": "arithmetic",
    "Adam and constraints": "memory",
    "weights exchange": "network",
    "gradients exchange": "network",
    "firing exchange": "network",
    "candidates exchange": "network",
    "reconstruction exchange": "network",
    "bias exchange": "network",
    "AuxK exchange": "network",
    "budget exchange": "network",
    "to the device": "feed",
}


def plan(work: Work, gpus: int, dict_size: int, machine: Machine) -> Plan:
    """Memory, traffic and time of one layout; the parts of a step are added, but reading goes on meanwhile."""
    data_size = gpus // dict_size
    traffic: dict[str, float] = {}
    exchange: dict[str, float] = {}
    # The ranks of a dictionary are adjacent, so that those that exchange the most share a node where they fit.
    speeds = {
        "dictionary": machine.fast_gbs if dict_size <= machine.node else machine.slow_gbs,
        "data": machine.fast_gbs if gpus <= machine.node else machine.slow_gbs,
    }
    speeds["all"] = speeds["data"]
    for one in collectives(work, data_size, dict_size):
        sent = one.sent(one.ranks(data_size, dict_size))
        part = f"{one.purpose} exchange"
        traffic[one.purpose] = traffic.get(one.purpose, 0.0) + sent
        exchange[part] = exchange.get(part, 0.0) + sent / (speeds[one.over] * 1e9)
    row = work.cache_bytes * (work.d_in + (0 if work.d_out is None else work.d_out))
    here = min(gpus, machine.node)
    rows = work.batch_size if work.placement == "replicated" else work.batch_size / data_size
    # The dictionary ranks of a node read the same rows, once: from then on they lie in the system's file cache.
    copies = max(1, here // dict_size) if work.placement == "sharded" else 1
    read = copies * rows * row
    checkpoint = work.parameters() * (4 + 2 * (4 if work.moments == "fp32" else 2))
    seconds = _seconds(work, data_size, dict_size, machine) | exchange
    seconds["to the device"] = work.batch_size / data_size * row / (machine.host_gbs * 1e9)
    feed = read / (machine.feed_gbs * 1e9)
    return Plan(
        gpus,
        data_size,
        dict_size,
        {part: size / 1e9 for part, size in _memory(work, data_size, dict_size).items()},
        {part: size / 1e6 for part, size in traffic.items()},
        read / 1e6,
        checkpoint / 1e9,
        seconds,
        feed,
        checkpoint / (machine.write_gbs * 1e9) / max(1, gpus // machine.node if work.placement == "sharded" else 1),
        work.batch_size,
    )


def _memory(work: Work, data_size: int, dict_size: int) -> dict[str, float]:
    """Bytes on one device, by purpose."""
    tokens, latents, parameters = work.batch_size / data_size, work.d_sae / dict_size, work.parameters(dict_size)
    own = parameters / data_size if work.placement == "sharded" else parameters
    moment = 4 if work.moments == "fp32" else 2
    memory = {"weights and gradients (fp32)": 8 * parameters, f"moments ({work.moments})": 2 * moment * own}
    if work.placement == "sharded" and data_size > 1:
        memory["own weights and gradients (fp32)"] = 8 * own
    if work.precision == "bf16":
        memory["copies of the matrices (bf16)"] = 2 * parameters
    memory["activations, reconstruction, errors (fp32)"] = 4 * tokens * (2 * work.d_in + 3 * work.out)
    memory["pre-activations held at a time"] = min(4 * tokens * latents, DEVICE_CHUNK_BYTES)
    memory["candidates"] = dict_size * tokens * work.k * 8 * 3  # gathered, sorted, ranked
    if work.dead:
        memory["AuxK"] = 8 * work.dead * latents * (work.d_in + work.out) + 4 * tokens * 3 * work.out
    return memory


def _seconds(work: Work, data_size: int, dict_size: int, machine: Machine) -> dict[str, float]:
    """Of the parts of a step on one device."""
    tokens, latents = work.batch_size / data_size, work.d_sae / dict_size
    parameters = work.parameters(dict_size) / (data_size if work.placement == "sharded" else 1)
    bandwidth = machine.memory_tbs * 1e12
    speed = machine.matmul_tflops * 1e12 / (1 if work.precision == "bf16" else 2)
    number = 2 if work.precision == "bf16" else 4
    aux = work.dead_candidates() / dict_size
    moved = 12 + 4 * (4 if work.moments == "fp32" else 2)  # Adam reads four numbers and writes three
    seconds = {
        "encode": 2 * tokens * work.d_in * latents / speed,
        "select": 2 * number * tokens * latents / bandwidth,
        "decode and gradient rows": 4 * 4 * tokens * (work.k / dict_size) * (work.d_in + work.out) / 2 / bandwidth,
    }
    if aux:
        rows = 4 * 4 * tokens * aux * (work.d_in + work.out) / 2 / bandwidth
        seconds["AuxK"] = 2 * tokens * work.d_in * work.dead * latents / speed + rows
    # Clearing the gradient, the decoder's norm and projection, and the gradient's norm are further passes.
    return seconds | {"Adam and constraints": (moved + 4 + 14 + 4) * parameters / bandwidth}


def layouts(work: Work, gpus: int, machine: Machine) -> list[Plan]:
    """Every layout of ``gpus`` that divides batch and latents, fastest first among those that fit the memory."""
    sizes = [
        size
        for size in range(1, gpus + 1)
        if gpus % size == 0 and work.d_sae % size == 0 and work.batch_size % (gpus // size) == 0
    ]
    plans = [plan(work, gpus, size, machine) for size in sizes]
    return sorted(plans, key=lambda p: (p.total_memory_gb > machine.memory_gb, -p.tokens_per_second))
