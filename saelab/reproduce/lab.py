"""Train and measure the SAEs of a comparison: same data, same order, same budget; results are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.evaluation import EvaluateConfig, evaluate, spliced
from saelab.files import write_json
from saelab.reproduce.ledger import summary
from saelab.sae import SAE, build
from saelab.sae.weights import CONFIG, load_metadata, load_sae, save
from saelab.training import TrainConfig, train
from saelab.training.rate import published

Log = Callable[[str], None]


@dataclass(frozen=True)
class Scale:
    """The size of a comparison on real activations. Counts are in tokens."""

    d_sae: int = 1152
    """Latents of each SAE."""
    ks: tuple[int, ...] = (16, 48)
    """Latents per token; one SAE for each, so that curves over L0 can be compared."""
    epochs: int = 1
    """Passes over the training split of the cache."""
    batch_size: int = 512
    """Tokens per training step."""
    lr: float | None = None
    """Adam's learning rate; by default 2e-4 / sqrt(d_sae / 2^14), with which the recorded results were measured."""
    lm_tokens: int = 1024
    """Tokens run through the language model for cross-entropy and KL."""
    density_tokens: int = 50_000
    """Training rows added to the window in which dead latents are counted."""
    saes_per_pass: int = 6
    """SAEs that share one pass of the language model; more take more memory."""
    passage_tokens: int = 32
    """Tokens of a passage in the probing tasks."""

    def __post_init__(self) -> None:
        counts = ("d_sae", "epochs", "batch_size", "lm_tokens", "saes_per_pass", "passage_tokens")
        for name, value in [*((name, getattr(self, name)) for name in counts), *(("ks", k) for k in self.ks or (0,))]:
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class Spec:
    """One SAE of a comparison; ``label`` names the curve it belongs to."""

    label: str
    variant: str
    d_sae: int
    config: Mapping[str, Any]
    seed: int

    @property
    def name(self) -> str:
        settings = "-".join(f"{key}{value}" for key, value in self.config.items())
        return f"{self.label}-{settings}-seed{self.seed}"


@dataclass
class Record:
    """The measurements of one SAE."""

    spec: Spec
    metrics: dict[str, float] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        return {"label": self.spec.label, "variant": self.spec.variant, "d_sae": self.spec.d_sae,
                "config": dict(self.spec.config), "seed": self.spec.seed, "metrics": self.metrics}  # fmt: skip


@dataclass
class Lab:
    """A cache, its language model, and the folder that keeps trained SAEs and measurements."""

    cache: ActivationCache
    model: Any
    scale: Scale
    folder: Path
    log: Log = lambda text: None
    decode: Callable[[list[int]], str] | None = None  # token ids to text, where the tokenizer is at hand
    device: torch.device | str = "cpu"  # where the SAEs are trained; they are measured on the CPU
    seconds: dict[str, float] = field(default_factory=dict)  # that each SAE took to train, here or earlier

    @property
    def middle_k(self) -> int:
        """The budget at which SAEs are compared one by one."""
        return sorted(self.scale.ks)[len(self.scale.ks) // 2]

    def sae(self, spec: Spec) -> SAE:
        """Train the SAE of ``spec``, or load it if this folder has it."""
        folder = self.folder / spec.name
        if (folder / CONFIG).exists():
            self.seconds[spec.name] = load_metadata(folder)["seconds"]
            return load_sae(folder)
        started = time.time()
        sae = train_spec(spec, self.cache, self.scale, self.device)
        self.seconds[spec.name] = time.time() - started
        self.log(f"trained {spec.name} in {self.seconds[spec.name]:.0f} s")
        save(sae, folder, {"train": {"seed": spec.seed}, "seconds": self.seconds[spec.name]})
        return sae

    def measure(self, specs: Sequence[Spec]) -> list[Record]:
        """Train what is missing, and measure everything on held-out tokens."""
        records = [Record(spec, self._offline(spec)) for spec in specs]
        missing = [record for record in records if self.model is not None and "ce_loss_with_sae" not in record.metrics]
        for start in range(0, len(missing), self.scale.saes_per_pass):
            self._in_model(missing[start : start + self.scale.saes_per_pass])
        return records

    def _offline(self, spec: Spec) -> dict[str, float]:
        sae, path = self.sae(spec), self._path(spec)
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        result = evaluate(sae, self.cache, config=EvaluateConfig(density_tokens=self.scale.density_tokens))
        metrics = {name: e.value for name, e in result.metrics.items() if not name.startswith("legacy")}
        write_json(path, metrics)
        return metrics

    def _in_model(self, records: Sequence[Record]) -> None:
        self.log(f"cross-entropy of {', '.join(r.spec.name for r in records)}")
        saes = {record.spec.name: self.sae(record.spec) for record in records}
        run = spliced(saes, self.cache, self.model, EvaluateConfig(lm_tokens=self.scale.lm_tokens))
        for record in records:
            estimates = run.sums[record.spec.name].estimates()
            record.metrics |= {name: e.value for name, e in estimates.items()}
            write_json(self._path(record.spec), record.metrics)

    def _path(self, spec: Spec) -> Path:
        # Numbers measured on other samples are not reused.
        return self.folder / spec.name / f"metrics-{self.scale.lm_tokens}-{self.scale.density_tokens}.json"


def train_spec(spec: Spec, cache: ActivationCache, scale: Scale, device: torch.device | str = "cpu") -> SAE:
    """One training run on ``device``; the result is on the CPU.

    The seed decides the initial weights and the order of the data.
    """
    torch.manual_seed(spec.seed)
    sae = build(spec.variant, d_in=cache.d_in, d_sae=spec.d_sae, **spec.config).to(device)
    lr = published(spec.d_sae) if scale.lr is None else scale.lr
    config = TrainConfig(epochs=scale.epochs, batch_size=scale.batch_size, lr=lr, seed=spec.seed, data_seed=spec.seed)
    train(sae, cache, config)
    return sae.eval().to("cpu")


def by_seed(records: Sequence[Record], label: str) -> dict[int, list[Record]]:
    """The records of one curve, by seed, in order of L0."""
    found: dict[int, list[Record]] = {}
    for record in records:
        if record.spec.label == label:
            found.setdefault(record.spec.seed, []).append(record)
    return {seed: sorted(curve, key=lambda r: r.metrics["l0"]) for seed, curve in sorted(found.items())}


def at_equal_l0(records: Sequence[Record], a: str, b: str, metric: str, points: int = 7) -> dict[str, Any]:
    """``metric`` of curve ``a`` minus that of curve ``b`` at equal measured L0, one number per seed, and its interval.

    Each curve is interpolated linearly in log L0 between its measured points, and the difference averaged over the
    range of L0 that both cover; curves with one point each are compared as they are, and the gap in L0 is stated.
    """
    differences, gaps, span = [], [], []
    curves_a, curves_b = by_seed(records, a), by_seed(records, b)
    for seed in curves_a.keys() & curves_b.keys():
        (xa, ya), (xb, yb) = (_curve(curves[seed], metric) for curves in (curves_a, curves_b))
        low, high = max(xa[0], xb[0]), min(xa[-1], xb[-1])
        if high > low:
            grid = np.linspace(low, high, points)
            differences.append(float((np.interp(grid, xa, ya) - np.interp(grid, xb, yb)).mean()))
            span.append((float(np.exp(low)), float(np.exp(high))))
        else:
            i, j = np.unravel_index(np.abs(xa[:, None] - xb).argmin(), (xa.size, xb.size))
            differences.append(float(ya[i] - yb[j]))
            gaps.append(float(np.exp(xa[i]) - np.exp(xb[j])))
    result = summary(differences)
    result["l0_range"] = [min(s[0] for s in span), max(s[1] for s in span)] if span else None
    result["l0_gap"] = max((abs(g) for g in gaps), default=0.0)
    return result


def _curve(records: Sequence[Record], metric: str) -> tuple[np.ndarray, np.ndarray]:
    return np.log([r.metrics["l0"] for r in records]), np.array([r.metrics[metric] for r in records])


def difference(records: Sequence[Record], a: str, b: str, metric: str) -> dict[str, Any]:
    """``metric`` of ``a`` minus that of ``b``, averaged over each seed's runs."""
    means = [
        {seed: float(np.mean([r.metrics[metric] for r in curve])) for seed, curve in by_seed(records, label).items()}
        for label in (a, b)
    ]
    return summary([means[0][seed] - means[1][seed] for seed in sorted(means[0].keys() & means[1].keys())])


def values(records: Sequence[Record], label: str, metric: str) -> list[float]:
    """A metric of every run of one curve."""
    return [r.metrics[metric] for r in records if r.spec.label == label]


def table(records: Sequence[Record], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each setting, for the ledger's figures."""
    rows: dict[tuple, list[Record]] = {}
    for record in records:
        key = (record.spec.label, json.dumps(dict(record.spec.config), sort_keys=True), record.spec.d_sae)
        rows.setdefault(key, []).append(record)
    out = []
    for (label, config, d_sae), group in rows.items():
        row: dict[str, Any] = {"label": label, "config": json.loads(config), "d_sae": d_sae, "seeds": len(group)}
        for m in metrics:
            if all(m in r.metrics for r in group):
                found = [r.metrics[m] for r in group]
                row |= {m: float(np.mean(found)), f"{m}_sd": float(np.std(found, ddof=1)) if len(group) > 1 else 0.0}
        out.append(row)
    return out
