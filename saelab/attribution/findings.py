"""What ablation says of an attribution graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ablated:
    """One latent: what attribution says, and by how much the target falls when it is set to zero."""

    id: str
    attributed: float
    ablated: float


@dataclass(frozen=True)
class Check:
    """The strongest latents, ablated one by one in the untouched model, every layer behind them reacting."""

    nodes: list[Ablated]

    @property
    def same_sign(self) -> int:
        """How many have the sign that ablation shows."""
        return sum(node.attributed * node.ablated > 0 for node in self.nodes)

    def within(self, factor: float) -> int:
        """How many have its sign, and its size up to ``factor``."""
        return sum(
            node.attributed * node.ablated > 0 and 1 / factor <= node.attributed / node.ablated <= factor
            for node in self.nodes
        )

    @property
    def factor(self) -> float:
        """The smallest factor that holds for nine of ten of the nodes that have the right sign; inf for none."""
        ratios = sorted(
            max(n.attributed / n.ablated, n.ablated / n.attributed) for n in self.nodes if n.attributed * n.ablated > 0
        )
        return ratios[max(0, -(-9 * len(ratios) // 10) - 1)] if ratios else float("inf")


@dataclass(frozen=True)
class Faithfulness:
    """The target with everything, the kept latents, the others, or none; the rest of the latents set to zero.

    Latents are encoded anew behind every change. Error terms stay; in ``strict`` those that the graph does not hold are
    set to zero too.
    """

    whole: float
    kept: float
    others: float
    none: float
    strict: float
    strict_none: float

    @property
    def faithfulness(self) -> float:
        """``(kept - none) / (whole - none)``: 1 where the kept latents do all that the latents do."""
        return _share(self.kept, self.none, self.whole)

    @property
    def completeness(self) -> float:
        """``1 - (others - none) / (whole - none)``: 1 where the latents left out do nothing on their own."""
        return 1 - _share(self.others, self.none, self.whole)

    @property
    def strict_faithfulness(self) -> float:
        """Faithfulness with the error terms of the graph alone, relative to neither latents nor error terms."""
        return _share(self.strict, self.strict_none, self.whole)


def _share(part: float, none: float, whole: float) -> float:
    return (part - none) / (whole - none) if whole != none else float("nan")
