"""What an evaluation of steering measures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from saelab.errors import UserError
from saelab.steering.evaluation.answers import Generation
from saelab.steering.measure.budget import check_budget
from saelab.steering.positions import check_where

DEFAULT = ("none", "prompt", "latent", "difference-of-means", "probe", "random")


@dataclass(frozen=True)
class SteerEvalConfig:
    """Methods, budget, and the size of the comparison."""

    methods: tuple[str, ...] = DEFAULT
    """Methods to compare: none, prompt, latent, latent-by-input, difference-of-means, probe, pca, random, recipe."""
    budget: float = 0.3
    """Damage that directions are calibrated to on neutral texts: KL divergence in nats per token, or with
    --budget-unit perplexity the ratio of perplexities."""
    budget_unit: str = "kl"
    """kl or perplexity."""
    levels: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths, as multiples of the budget (of what it exceeds 1 by, for perplexity)."""
    instructions: int = 10
    """Number of instructions: every other one chooses the strength, the others are for the verdict."""
    seeds: int = 1
    """Seeds: random directions and, with a temperature, answers are drawn anew for each."""
    where: str = "all"
    """On which tokens to steer: all, prompt or generated."""
    max_new_tokens: int = 40
    """Tokens of an answer."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    batch: int = 48
    """Answers that are generated together."""

    def __post_init__(self) -> None:
        check_budget(self.budget, self.budget_unit)
        check_where(self.where)
        if not self.levels or not all(0 < level < math.inf for level in self.levels):
            raise UserError(f"levels={self.levels} must be numbers above 0, multiples of the budget")
        if sorted(set(self.levels)) != list(self.levels):
            raise UserError(f"levels={self.levels} must rise")
        if self.instructions < 2:
            raise UserError(f"instructions={self.instructions} must be at least 2: one to choose on, one to test on")
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds} must be at least 1")
        _ = self.generation

    @property
    def generation(self) -> Generation:
        """How answers are written."""
        return Generation(self.max_new_tokens, self.temperature, self.batch)

    def budgets(self) -> list[float]:
        """The damage of each level."""
        if self.budget_unit == "kl":
            return [self.budget * level for level in self.levels]
        return [1 + (self.budget - 1) * level for level in self.levels]

    @staticmethod
    def split(instruction: int) -> str:
        """Which instructions choose the strength and which ones test it."""
        return "choose" if instruction % 2 == 0 else "test"
