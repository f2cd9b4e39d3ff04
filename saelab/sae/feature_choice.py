"""Feature Choice: each latent chooses its tokens (Ayonrinde, 2024, arXiv 2411.02124).

Latent j keeps its ``m_j`` largest affinities in a batch, with ``m_j`` from a Zipf law and the sum of all ``m_j`` equal
to ``n * k``; tokens get as many latents as choose them. The law is fitted to the densities of a Mutual Choice phase
that comes first; a fresh, shorter learning-rate ramp starts the second phase. At inference every latent has a
threshold, above which it is active as often as its budget says.

Only the abstract and the reviews of the paper were available. They say that densities follow a Zipf law which sets the
budgets; the law's parameters, the split of the phases, the learning rates and the rule at inference are our choices,
and no number of that paper is reproduced here. A latent may be made to choose tokens on which its affinity is zero or
less: those count as inactive, and L0 stays below the budget (``realised_budget`` in the log).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from saelab import kernels
from saelab.errors import UserError
from saelab.kernels import SelectedPreActs
from saelab.sae import zipf
from saelab.sae.mutual_choice import MutualChoice
from saelab.sae.share import spend_by_latent
from saelab.sae.threshold import RunningMean, calibration_sample, latent_thresholds
from saelab.sparse import SparseCode


class FeatureChoice(MutualChoice, variant="feature_choice"):
    """The ``m_j`` largest of each ``ReLU(u_j)`` over a batch; ``u_j > threshold_j`` at inference."""

    scaled = (*MutualChoice.scaled, "latent_threshold.total")
    tunable = (*MutualChoice.tunable, "second_lr", "second_warmup")
    on_host = (*MutualChoice.on_host, "switched")
    rates: Tensor
    switched: Tensor
    realised: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        budgets: Literal["zipf", "uniform"] = "zipf",
        mutual_share: float = 0.5,
        second_lr: float = 0.3,
        second_warmup: float = 0.05,
        **options: Any,
    ) -> None:
        """
        Args:
            budgets: Tokens per latent from the fitted Zipf law, or the same for all (ablation).
            mutual_share: Share of the steps in the Mutual Choice phase; 0 starts with equal budgets.
            second_lr: Learning rate of the second phase, relative to that of the first.
            second_warmup: Share of the steps over which the second phase's learning rate rises from 0.
        """
        super().__init__(d_in, d_sae, **options)
        if not (0 <= mutual_share <= 1 and 0 <= second_warmup <= 1):
            raise UserError(f"mutual_share={mutual_share} and second_warmup={second_warmup} are shares from 0 to 1")
        self.budgets, self.mutual_share = budgets, mutual_share
        self.second_lr, self.second_warmup = second_lr, second_warmup
        self.latent_threshold = RunningMean(d_sae)
        self.register_buffer("rates", torch.zeros(d_sae, dtype=torch.float64))  # m_j / n
        # The step at which Feature Choice began, -1 before; a plain number, also readable in an SAE without storage.
        self.register_buffer("switched", torch.tensor(-1, device="cpu"))
        self._peak: tuple[Tensor, int, float] | None = None  # the rates, their version, the largest share
        self.register_buffer("realised", torch.zeros((), dtype=torch.float64))  # share of the budget spent, last batch
        if mutual_share == 0 and not self.rates.is_meta:  # without storage only sizes are wanted
            self.choose(0)

    @property
    def budget_over(self) -> Literal["batch", "latent"]:
        return "latent" if self.choosing else "batch"

    def join(self, part: int, gather: Callable[[Tensor], Tensor]) -> None:
        super().join(part, gather)
        if self.choosing:
            self.choose(self.began)

    @property
    def began(self) -> int:
        """The step at which the second phase began, -1 before."""
        return int(self.switched.numpy())

    @property
    def choosing(self) -> bool:
        """Whether the second phase has begun, in which latents choose their tokens."""
        return self.began >= 0

    @torch.no_grad()
    def choose(self, step: int) -> None:
        """Begin the second phase: fix every latent's budget by the densities of the first."""
        self.fit_law()
        if self.budgets == "uniform":
            self.rates.fill_(self.k / self.gather(self.rates).numel())
        else:
            self.rates.copy_(self.law())
        self.switched.fill_(step)

    def select(self, x: Tensor, grads: Tensor | None) -> SelectedPreActs:
        if not self.choosing:
            return super().select(x, grads)
        if not self.training:
            return self.select_above(x, self.latent_threshold.mean())
        rates, n, operands = self.gather(self.rates), x.shape[0], (x, self.W_enc, self.b_enc, self.b_in)
        budgets = zipf.budgets(rates.flatten(), n * self.share.parts, self.budget, self.n_seen)
        sizes = self._sizes(n) if rates.shape[0] == self.share.parts == 1 else None
        return spend_by_latent(
            lambda own: kernels.select_latent(*operands, own, self.signed, sizes),
            n,
            budgets.view_as(rates)[self.part],
            self.share,
        )

    def _sizes(self, n: int) -> tuple[int, int]:
        """How many entries a batch of ``n`` tokens has, and how many one latent has at most."""
        held = self._peak
        if held is None or held[0] is not self.rates or held[1] != self.rates._version:
            held = self._peak = (self.rates, self.rates._version, (self.rates.max() / self.rates.sum()).item())
        total = int(self.budget * n)
        share = held[2] * total
        return total, n if share + 2 > n else int(share) + 2

    def observe(self, x: Tensor, code: SparseCode, grads: Tensor | None) -> None:
        super().observe(x, code, grads)
        active = code.values != 0
        spent, n = self.share.sum(self.gather(active.sum()).sum()), code.n * self.share.parts
        self.realised.copy_(spent / int(self.budget * n))
        if self.choosing:
            least = code.values.new_full((self.d_sae,), torch.inf)
            least.scatter_reduce_(0, code.indices, torch.where(active, code.values.detach().abs(), torch.inf), "amin")
            least = self.share.least(least)
            fired = least.isfinite()
            self.latent_threshold.update(least.where(fired, 0), where=fired)

    def aux_renews(self, step: int) -> bool:
        return super().aux_renews(step) or step == self.began  # the law was fitted at the end of the last step

    def fit_law(self) -> None:
        if not self.choosing:  # afterwards the budgets force densities to follow the law
            super().fit_law()

    def after_step(self, step: int, n_steps: int) -> None:
        if not self.choosing and step >= self.mutual_share * n_steps:
            self.choose(step)

    @torch.no_grad()
    def before_fine_tuning(self, scale: float) -> None:
        if self.choosing:
            self.switched.zero_()  # what it counts are steps of the run at hand

    def lr_scale(self, step: int, n_steps: int) -> float:
        if not self.choosing or self.mutual_share == 0:
            return 1.0
        ramp = self.second_warmup * n_steps
        return self.second_lr * min(1.0, (step - self.began + 1) / (ramp + 1))

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        if not self.choosing:
            super().calibrate(batches)
        elif (x := calibration_sample(batches, self.d_in)) is not None:
            self.latent_threshold.set_(latent_thresholds(self, x, self.rates))

    def inference_threshold(self) -> Tensor | None:
        return self.latent_threshold.mean() if self.choosing else super().inference_threshold()

    def diagnostics(self) -> dict[str, float | Tensor]:
        phase = {"phase": 1.0 + self.choosing, "realised_budget": self.realised}
        return {**super().diagnostics(), **phase}
