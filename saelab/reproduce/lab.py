"""Train and measure the SAEs of a comparison: same data, same order, same budget, each at a tuned rate."""

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
from saelab.errors import UserError, damaged
from saelab.evaluation import EvaluateConfig, evaluate, spliced
from saelab.evaluation.reconstruction import reconstruction
from saelab.files import write_json
from saelab.sae import SAE, build
from saelab.sae.weights import CONFIG, load_metadata, load_sae, save
from saelab.training import TrainConfig, train
from saelab.training.config import chosen_rate

Log = Callable[[str], None]
FACTORS = (0.5, 1.0, 2.0)  # of the default learning rate, that are tried first
EXTENSIONS = 2  # rates tried beyond them, where the best one is the smallest or the largest
SLOW = ("gradient_topk", "matching_pursuit")  # compared at small budgets alone
VALIDATION = 0.05  # share of the training rows that rates are compared on; no SAE is trained on them


@dataclass(frozen=True)
class Scale:
    """The size of a comparison on real activations. Counts are in tokens."""

    d_sae: int = 1152
    """Latents of each SAE."""
    ks: tuple[int, ...] = (16, 32, 58, 96)
    """Latents per token; one SAE for each, so that curves over the budget can be compared."""
    epochs: int = 1
    """Passes over the training split of the cache."""
    batch_size: int = 2048
    """Tokens per training step."""
    lr: float | None = None
    """Adam's learning rate for all SAEs; by default the usual one times a factor tuned on validation rows."""
    lm_tokens: int = 16_384
    """Tokens run through the language model for cross-entropy and KL, spread over the held-out documents."""
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
    """One SAE of a comparison; ``label`` names the curve it belongs to, ``budget`` the point on it."""

    label: str
    variant: str
    d_sae: int
    config: Mapping[str, Any]
    seed: int

    @property
    def group(self) -> str:
        settings = "-".join(f"{key}{value}" for key, value in self.config.items())
        return f"{self.label}-{settings}"

    @property
    def name(self) -> str:
        return f"{self.group}-seed{self.seed}"

    @property
    def budget(self) -> int:
        """Latents per token."""
        return self.config["k"] if "k" in self.config else self.config["n_steps"]


@dataclass
class Record:
    """The measurements of one SAE; ``by_document`` holds the sums of each held-out document that intervals need."""

    spec: Spec
    metrics: dict[str, float] = field(default_factory=dict)
    by_document: dict[str, list[float]] = field(default_factory=dict)

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

    def __post_init__(self) -> None:
        if self.scale.lr is None:
            self.cache = self.cache.with_validation(VALIDATION)

    @property
    def papers_k(self) -> int:
        """The budget nearest to a tenth of the width, AbsTopK's: there SAEs are compared one by one."""
        return min(self.scale.ks, key=lambda k: abs(k - self.cache.d_in / 10))

    @property
    def small_ks(self) -> list[int]:
        """The two smallest budgets, for variants whose steps are slow or whose caches are small."""
        return sorted(self.scale.ks)[:2]

    def sae(self, spec: Spec) -> SAE:
        """Train the SAE of ``spec`` at the rate of its group, or load it if this folder has it."""
        folder, lead = self.folder / spec.name, self._lead(spec)
        if self.scale.lr is None and spec == lead and not (folder / CONFIG).exists():
            folder = self._trial(lead, self._factor(lead))  # it was trained when the rate was chosen
        return self._trained(spec, self.rate(spec), folder)

    def rate(self, spec: Spec) -> float:
        """The learning rate of a spec: given, or the default one times the factor that suits its curve best.

        The factor is chosen by FVU on the validation rows, with one seed, at the papers' budget (the larger of the two
        small ones where a variant is slow); the default rate follows the budget. Up to two more factors are tried where
        the best is the smallest or the largest.
        """
        return self._factor(spec) * self._default_rate(spec) if self.scale.lr is None else self.scale.lr

    def _factor(self, spec: Spec) -> float:
        lead = self._lead(spec)
        path = self.folder / "rates" / f"{lead.group}.json"
        with damaged(path, "remove it; it is made again"):
            text = path.read_text(encoding="utf-8") if path.exists() else '{"fvu": {}}'
            record: dict[str, Any] = json.loads(text)
        if "factor" not in record:
            found: dict[float, float] = {float(factor): fvu for factor, fvu in record["fvu"].items()}
            default = self._default_rate(lead)
            while (factor := _untried(found)) is not None:
                sae = self._trained(lead, factor * default, self._trial(lead, factor))
                sums, _ = reconstruction(sae, self.cache, split="validation")
                found[factor] = sums.estimates()["fvu"].value
                record = {"default": default, "fvu": {f"{f:g}": fvu for f, fvu in sorted(found.items())}}
                write_json(path, record)
            record["factor"] = min(found, key=found.__getitem__)
            write_json(path, record)
            self.log(f"{lead.group}: {record['factor']:g} times the default learning rate of {default:.2g}")
        return record["factor"]

    def _trial(self, lead: Spec, factor: float) -> Path:
        return self.folder / "rates" / lead.name / f"{factor:g}"

    def _lead(self, spec: Spec) -> Spec:
        """The SAE with whose learning rate the others of its curve are trained."""
        name = "k" if "k" in spec.config else "n_steps"
        budget = self.papers_k if spec.variant not in SLOW else self.small_ks[-1]
        return Spec(spec.label, spec.variant, spec.d_sae, {**spec.config, name: budget}, 0)

    def _default_rate(self, spec: Spec) -> float:
        return chosen_rate(_built(spec, self.cache), self.cache, self._config(0, "auto")).value

    def measure(self, specs: Sequence[Spec]) -> list[Record]:
        """Train what is missing, and measure everything on held-out tokens."""
        records = [self._offline(spec) for spec in specs]
        missing = [record for record in records if self.model is not None and "ce_loss_with_sae" not in record.metrics]
        for start in range(0, len(missing), self.scale.saes_per_pass):
            self._in_model(missing[start : start + self.scale.saes_per_pass])
        return records

    def _config(self, seed: int, lr: float | Any) -> TrainConfig:
        return TrainConfig(epochs=self.scale.epochs, batch_size=self.scale.batch_size, lr=lr, seed=seed, data_seed=seed)

    def _trained(self, spec: Spec, lr: float, folder: Path) -> SAE:
        if (folder / CONFIG).exists():
            self.seconds[str(folder)] = load_metadata(folder)["seconds"]
            return load_sae(folder)
        started = time.time()
        sae = train_spec(spec, self.cache, self._config(spec.seed, lr), self.device)
        seconds = self.seconds[str(folder)] = time.time() - started
        self.log(f"trained {spec.name} at {lr:.2g} in {seconds:.0f} s")
        save(sae, folder, {"train": {"seed": spec.seed, "lr": lr}, "seconds": seconds})
        return sae

    def _offline(self, spec: Spec) -> Record:
        sae, path = self.sae(spec), self._path(spec)
        if path.exists():
            with damaged(path, "remove it; it is made again"):
                kept = json.loads(path.read_text(encoding="utf-8"))
                return Record(spec, kept["metrics"], kept["by_document"])
        result = evaluate(sae, self.cache, config=EvaluateConfig(density_tokens=self.scale.density_tokens))
        metrics = {name: e.value for name, e in result.metrics.items() if not name.startswith("legacy")}
        record = Record(spec, metrics, {name: list(values) for name, values in result.by_document.items()})
        self._keep(record)
        return record

    def _in_model(self, records: Sequence[Record]) -> None:
        self.log(f"cross-entropy of {', '.join(r.spec.name for r in records)}")
        saes = {record.spec.name: self.sae(record.spec) for record in records}
        run = spliced(saes, self.cache, self.model, EvaluateConfig(lm_tokens=self.scale.lm_tokens))
        for record in records:
            sums = run.sums[record.spec.name]
            record.metrics |= {name: e.value for name, e in sums.estimates().items()}
            record.by_document |= sums.by_document()
            self._keep(record)

    def _keep(self, record: Record) -> None:
        content = {"metrics": record.metrics, "by_document": record.by_document}
        path = self._path(record.spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    def _path(self, spec: Spec) -> Path:
        # Numbers measured on other samples are not reused.
        return self.folder / spec.name / f"measured-{self.scale.lm_tokens}-{self.scale.density_tokens}.json"


def _untried(found: Mapping[float, float]) -> float | None:
    """The next multiple of the default rate to try; None once the best lies inside of those that were."""
    for factor in FACTORS:
        if factor not in found:
            return factor
    best = min(found, key=found.__getitem__)
    if len(found) >= len(FACTORS) + EXTENSIONS or min(found) < best < max(found):
        return None
    return best / 2 if best == min(found) else best * 2


def _built(spec: Spec, cache: ActivationCache) -> SAE:
    torch.manual_seed(spec.seed)
    return build(spec.variant, d_in=cache.d_in, d_sae=spec.d_sae, **spec.config)


def train_spec(spec: Spec, cache: ActivationCache, config: TrainConfig, device: torch.device | str = "cpu") -> SAE:
    """One training run on ``device``; the result is on the CPU.

    The seed decides the initial weights and the order of the data.
    """
    sae = _built(spec, cache).to(device)
    train(sae, cache, config)
    return sae.eval().to("cpu")


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
