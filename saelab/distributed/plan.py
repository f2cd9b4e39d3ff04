"""Estimate what a large SAE costs on many GPUs: memory, traffic and time per step, from formulas.

`saelab plan` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass


def traffic_per_step(n: int, d_in: int, d_sae: int, k: int, data_size: int = 1, dict_size: int = 1) -> dict[str, float]:
    """Bytes one process sends per step, by purpose, for ``n`` tokens in the whole batch.

    An all-reduce of ``B`` bytes over ``R`` ranks sends ``2 (R - 1) / R B`` from each (ring), an all-gather of ``B``
    bytes from each ``(R - 1) B``. Scalars and firing flags are left out. While latents are dead, AuxK adds a second
    reconstruction and ``k_aux / k`` times the candidates.
    """
    own_latents, own_tokens = d_sae / dict_size, n / data_size
    ring_data, ring_dict = 2 * (data_size - 1) / data_size, 2 * (dict_size - 1) / dict_size
    parameters = 2 * own_latents * d_in + own_latents + d_in
    return {
        "gradients": ring_data * 4 * parameters,  # over the data ranks
        "candidates": (dict_size - 1) * own_tokens * k * (4 + 4),  # value and index, over the dictionary ranks
        "reconstruction": ring_dict * 4 * own_tokens * d_in,
        "bias": ring_dict * 4 * d_in,
    }


@dataclass(frozen=True)
class Machine:
    """A GPU and its links, as sustained rates (defaults: H100 SXM nodes of 8 with 400 Gbit/s per GPU between them).

    The rates are data-sheet figures with usual efficiencies, not measurements of this code.
    """

    matmul_tflops: float = 600.0
    """bf16 matrix products, 1e12 operations a second."""
    memory_tbs: float = 2.8
    """Device memory, 1e12 bytes a second."""
    memory_gb: float = 80.0
    """Device memory, 1e9 bytes."""
    node: int = 8
    """GPUs joined by the fast link."""
    fast_gbs: float = 350.0
    """Within a node, 1e9 bytes a second sent by each GPU."""
    slow_gbs: float = 40.0
    """Between nodes, 1e9 bytes a second sent by each GPU."""


@dataclass(frozen=True)
class Plan:
    """One layout of a run, per GPU and step."""

    gpus: int
    data_size: int
    dict_size: int
    memory_gb: dict[str, float]
    traffic_mb: dict[str, float]
    seconds: dict[str, float]
    tokens_per_second: float

    @property
    def total_memory_gb(self) -> float:
        return sum(self.memory_gb.values())

    @property
    def bottleneck(self) -> str:
        """The part of a step that takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])


def plan(gpus: int, dict_size: int, n: int, d_in: int, d_sae: int, k: int, machine: Machine) -> Plan:
    """Memory, traffic and time of one layout; parts of a step are added, nothing overlaps."""
    data_size = gpus // dict_size
    tokens, latents = n / data_size, d_sae / dict_size
    parameters = 2 * latents * d_in + latents + d_in
    traffic = traffic_per_step(n, d_in, d_sae, k, data_size, dict_size)
    memory = {
        "weights, gradients, moments (fp32)": 16 * parameters,
        "encoder copy (bf16)": 2 * latents * d_in,
        "activations, reconstruction, errors (fp32)": 5 * 4 * tokens * d_in,
        "pre-activations (bf16)": 2 * tokens * latents,
        "candidates": dict_size * tokens * k * 8 * 3,  # gathered, sorted, ranked
    }
    # The ranks of a dictionary are adjacent, so that those that exchange the most share a node where they fit.
    inside = machine.fast_gbs if dict_size <= machine.node else machine.slow_gbs
    across = machine.fast_gbs if gpus <= machine.node else machine.slow_gbs
    bandwidth = machine.memory_tbs * 1e12
    seconds = {
        "encode": 2 * tokens * d_in * latents / (machine.matmul_tflops * 1e12),
        "select": 2 * 2 * tokens * latents / bandwidth,
        "decode and gradient rows": 4 * 4 * tokens * (k / dict_size) * d_in / bandwidth,
        # Adam reads weight, gradient and moments and writes all but the gradient; clearing the gradient, the decoder's
        # norm and projection, and the gradient's norm are further passes.
        "Adam and constraints": (28 + 4 + 14 + 4) * parameters / bandwidth,
        "gradient exchange": traffic["gradients"] / (across * 1e9),
        "candidate exchange": traffic["candidates"] / (inside * 1e9),
        "reconstruction exchange": (traffic["reconstruction"] + traffic["bias"]) / (inside * 1e9),
    }
    return Plan(
        gpus,
        data_size,
        dict_size,
        {part: size / 1e9 for part, size in memory.items()},
        {part: size / 1e6 for part, size in traffic.items()},
        seconds,
        n / sum(seconds.values()),
    )


def layouts(gpus: int, n: int, d_in: int, d_sae: int, k: int, machine: Machine) -> list[Plan]:
    """Every layout of ``gpus`` that divides batch and latents, fastest first among those that fit the memory."""
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0 and d_sae % size == 0 and n % (gpus // size) == 0]
    plans = [plan(gpus, size, n, d_in, d_sae, k, machine) for size in sizes]
    return sorted(plans, key=lambda p: (p.total_memory_gb > machine.memory_gb, -p.tokens_per_second))
