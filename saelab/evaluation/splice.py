"""The language model with the SAE spliced in: cross-entropy and KL against the untouched model and two ablations.

Activations at the hook are replaced by their reconstruction, by zero, or by the cache's mean, at every position that
has a row in the cache; positions without a row (the first of each context, dropped outliers) stay untouched in all
runs, because the SAE was never trained on them. Layers below the hook run once per context: at the hook the batch
grows by one copy per variant, and only the layers above see them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.devices import in_float64
from saelab.errors import UserError
from saelab.lm.fingerprint import row_gaps
from saelab.lm.offload import device_of
from saelab.lm.route import Route
from saelab.metrics.intervals import Array, Estimate, from_resamples, resampled_sums

FORMULAS = {
    "ce_loss_without_sae": "mean next-token cross-entropy of the untouched model, nats, at replaced positions",
    "ce_loss_with_sae": "the same with activations replaced by their reconstruction",
    "ce_loss_with_zero_ablation": "the same with activations replaced by zero",
    "ce_loss_with_mean_ablation": "the same with activations replaced by the mean over the cache's training rows",
    "ce_loss_increase": "ce_loss_with_sae - ce_loss_without_sae",
    "ce_loss_recovered_zero": "(ce_zero - ce_sae) / (ce_zero - ce_clean), zero ablation",
    "ce_loss_recovered_mean": "(ce_mean - ce_sae) / (ce_mean - ce_clean), mean ablation",
    "kl_div_with_sae": "mean KL(untouched || with SAE) of the next-token distribution, nats",
    "kl_div_with_zero_ablation": "mean KL(untouched || zero ablation)",
    "kl_div_with_mean_ablation": "mean KL(untouched || mean ablation)",
    "kl_recovered_zero": "(kl_zero - kl_sae) / kl_zero",
    "kl_recovered_mean": "(kl_mean - kl_sae) / kl_mean",
}
ABLATIONS = ("zero", "mean")
ROWS = 8
Replace = Callable[[Float[Tensor, "n d_in"], Int[Tensor, " n"]], Float[Tensor, "n d_out"]]


@dataclass
class LossSums:
    """Per context: its document, replaced positions, and sums over them: untouched model, SAE, zero and mean."""

    document: list[int] = field(default_factory=list)
    n: list[int] = field(default_factory=list)
    ce: list[list[float]] = field(default_factory=list)  # clean, sae, zero, mean
    kl: list[list[float]] = field(default_factory=list)  # sae, zero, mean

    def estimates(self, seed: int = 0) -> dict[str, Estimate]:
        """Every loss and share of ``FORMULAS`` with its interval over documents."""
        total = sum(self.n)
        if total == 0:
            raise UserError("no held-out position was replaced, so there is no loss to compare; harvest more text")
        columns = self._documents()
        documents = len(columns[0])
        n, ce, kl = resampled_sums(*columns, seed=seed)
        ce, kl = ce / n[:, None], kl / n[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            values = _shares(ce, kl)
        return {
            name: from_resamples(values[name], total, "token", formula, documents)
            for name, formula in FORMULAS.items()
            if np.isfinite(values[name][0])
        }

    def by_document(self) -> dict[str, list[float]]:
        """Replaced positions ``n`` and summed losses of each document: ``ce_clean``, ``ce_sae``, ``ce_zero``,
        ``ce_mean``, ``kl_sae``, ``kl_zero`` and ``kl_mean``."""
        n, ce, kl = self._documents()
        kinds = ("clean", "sae", *ABLATIONS)
        found = {"n": n, **{f"ce_{kind}": column for kind, column in zip(kinds, ce.T)}}
        found |= {f"kl_{kind}": column for kind, column in zip(kinds[1:], kl.T)}
        return {name: column.tolist() for name, column in found.items()}

    def _documents(self) -> list[Array]:
        """``n``, ``ce`` and ``kl`` summed over the contexts of each document."""
        documents, own = np.unique(self.document, return_inverse=True)
        columns = [np.zeros((len(documents), *np.shape(column)[1:])) for column in (self.n, self.ce, self.kl)]
        for column, values in zip(columns, (self.n, self.ce, self.kl)):
            np.add.at(column, own, values)
        return columns


class _Earlier(NamedTuple):
    """An ablated context: what was at the hook, and the logits."""

    hidden: Tensor
    logits: Tensor
    tokens: Tensor

    def shows(self, hidden: Tensor, tokens: Tensor) -> bool:
        """Whether another context with the same at the hook has other tokens, so that its logits tell whether these
        matter."""
        return torch.equal(self.hidden, hidden) and not torch.equal(self.tokens, tokens)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether logits ``[position, vocabulary]`` of two passes are the same up to rounding, at nine positions in ten: a
    router in bfloat16 sends a few tokens to other experts."""
    gaps = row_gaps(found, expected)
    limit = min(64 * torch.finfo(expected.dtype).eps ** 0.75, 0.1)
    return float((~(gaps <= limit)).float().mean()) <= 0.1


def _shares(ce: Array, kl: Array) -> dict[str, Array]:
    clean, sae, zero, mean = ce.T
    kl_sae, kl_zero, kl_mean = kl.T
    return {
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": sae,
        "ce_loss_with_zero_ablation": zero,
        "ce_loss_with_mean_ablation": mean,
        "ce_loss_increase": sae - clean,
        "ce_loss_recovered_zero": _share(zero - sae, zero - clean),
        "ce_loss_recovered_mean": _share(mean - sae, mean - clean),
        "kl_div_with_sae": kl_sae,
        "kl_div_with_zero_ablation": kl_zero,
        "kl_div_with_mean_ablation": kl_mean,
        "kl_recovered_zero": _share(kl_zero - kl_sae, kl_zero),
        "kl_recovered_mean": _share(kl_mean - kl_sae, kl_mean),
    }


def _share(part: Array, whole: Array) -> Array:
    # An ablation that costs nothing leaves nothing to recover: no number, rather than one with a flipped sign.
    return np.where(whole > 0, part / whole, np.nan)


class SplicedRun:
    """Runs contexts through ``model`` with every variant at once and sums the losses of each SAE.

    ``model(input_ids=..., use_cache=False)`` returns an object with ``logits``. ``replace[name](x, rows)`` gives the
    reconstruction, by one of several SAEs, from the activations ``x [n, d_in]`` whose cache rows are ``rows``; they are
    read where ``route`` begins, and what is replaced is where it ends. ``residual`` says that this place is the
    residual stream. In most models it carries everything the layers above see: then an ablated context that equals the
    previous one bit for bit (all positions but an identical first one are ablated) reuses its logits, which is exact
    and halves the work. Some give later layers the tokens once more (Gemma 4, Zamba), so the first such context runs
    all the same and is compared.
    """

    def __init__(
        self,
        model: nn.Module,
        route: Route,
        mean: Float[Tensor, " d_out"],
        replace: Mapping[str, Replace],
        residual: bool,
    ) -> None:
        self.model, self.route, self.mean, self.replace, self.residual = model, route, mean, dict(replace), residual
        self.sums = {name: LossSums() for name in replace}
        self.reused: dict[str, _Earlier] = {}  # by ablation
        self.carries_all: bool | None = None  # whether logits follow from what is at the hook; None until it was seen
        self.grows: bool | None = None  # whether the batch may grow at the hook; found on the first context
        self.seconds_lm = 0.0  # in the model, SAE excluded
        self.passes_reused = 0

    @torch.no_grad()
    def add(self, tokens: Int[Tensor, " t"], rows: Int[Tensor, " t"], document: int) -> None:
        """One context: its token ids, and the cache row of each (-1: left untouched), both on the CPU.

        ``document`` is the one that the interval counts the context for.
        """
        logits = self._logits(tokens, rows)
        # The last position predicts nothing that is known.
        at = (rows[:-1] >= 0).nonzero().flatten()
        if at.numel() == 0:
            return
        device = logits["clean"].device
        ce, kl = self._losses(logits, at.to(device), tokens[1:].to(device))
        for name, sums in self.sums.items():
            sums.document.append(document)
            sums.n.append(at.numel())
            sums.ce.append([ce["clean"], ce[name], ce["zero"], ce["mean"]])
            sums.kl.append([kl[name], kl["zero"], kl["mean"]])

    def _losses(
        self, logits: dict[str, Tensor], at: Tensor, targets: Tensor
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Summed cross-entropies, and divergences from the untouched model, over the positions ``at``."""
        others = [*ABLATIONS, *self.replace]
        ce, kl = dict.fromkeys(["clean", *others], 0.0), dict.fromkeys(others, 0.0)
        # A few rows of a vocabulary at a time stay in the processor's cache.
        for rows in at.split(ROWS):
            clean, wanted = logits["clean"][rows].float(), targets[rows]
            lse = clean.logsumexp(dim=1)
            p = (clean - lse[:, None]).exp_()
            ce["clean"] += _cross_entropy(clean, lse, wanted)
            for name in others:
                other = logits[name][rows].float()
                lse_other = other.logsumexp(dim=1)
                ce[name] += _cross_entropy(other, lse_other, wanted)
                # sum_v p_v (log p_v - log q_v); the difference first, so that equal logits give exactly zero
                kl[name] += float(in_float64(torch.linalg.vecdot(p, clean - other) - (lse - lse_other)).sum())
        return ce, kl

    def _logits(self, tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
        hidden: dict[str, Tensor] = {}
        seconds_edit = 0.0
        if self.grows is None:
            self.grows = self._batch_may_grow(tokens)
        copies = 1 if self.grows else 1 + len(ABLATIONS) + len(self.replace)

        def edit(source: Tensor, acts: Tensor) -> Tensor:
            nonlocal seconds_edit
            started = time.perf_counter()
            hidden.update(self._variants(source[0], acts[0], rows))
            stacked = torch.stack([*hidden.values(), *[acts[0]] * (copies - len(hidden))])
            seconds_edit += time.perf_counter() - started
            return stacked

        started = time.perf_counter()
        with self.route.register(self.model, edit):
            out = self._run(tokens.expand(copies, -1))
        self.seconds_lm += time.perf_counter() - started - seconds_edit
        logits = dict(zip(hidden, out))
        for name in ABLATIONS if self.residual and self.carries_all is not False else ():
            before = self.reused.get(name)
            if name not in logits and before is not None:
                logits[name] = before.logits
                self.passes_reused += 1
                continue
            if before is not None and self.carries_all is None and before.shows(hidden[name], tokens):
                self.carries_all = _agree(logits[name], before.logits)
            self.reused[name] = _Earlier(hidden[name], logits[name].clone(), tokens)
        return logits

    def _batch_may_grow(self, tokens: Tensor) -> bool:
        """Whether the layers above the hook take more rows than those below; else every row runs from the start.

        What a model prepares for its input's rows (ALiBi in BLOOM), or adds to later (outputs of a sublayer), need not
        fit. Two rows that are the one row must have its logits.
        """
        expected = self._run(tokens[None])[0]
        try:
            with self.route.write.register(self.model, lambda acts: torch.cat([acts, acts])):
                found = self._run(tokens[None])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError):
            return False
        if found.shape != (2, *expected.shape):
            return False
        return all(_agree(row, expected) for row in found)

    def _run(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens.to(device_of(self.model)), use_cache=False).logits

    def _variants(self, source: Tensor, acts: Tensor, rows: Tensor) -> dict[str, Tensor]:
        own = rows[rows >= 0]
        stored, mean = (rows >= 0).to(acts.device), self.mean.to(acts.device)
        x = source[stored].float()
        made = {"clean": acts}
        for name, replace in self.replace.items():
            made[name] = acts.index_put((stored,), replace(x, own).to(acts))
        for name, value in zip(ABLATIONS, (torch.zeros_like(mean), mean)):
            ablated = torch.where(stored[:, None], value.to(acts.dtype), acts)
            before = self.reused.get(name)
            if not self.carries_all or before is None or not torch.equal(before.hidden, ablated):
                made[name] = ablated
        return made


def _cross_entropy(logits: Tensor, lse: Tensor, targets: Tensor) -> float:
    return float(in_float64(lse - logits.gather(1, targets[:, None])[:, 0]).sum())
