"""Mutual Choice and Feature Choice (Ayonrinde, 2024, arXiv 2411.02124) against TopK and BatchTopK.

The paper's text was not available; variants follow its abstract and reviews (see their files), and no number of the
paper is reproduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saelab import losses
from saelab.data.synthetic import Planted
from saelab.evaluation.controls import untrained
from saelab.evaluation.reconstruction import count_firing
from saelab.metrics import FiringCounts, lognormal_r2, zipf_fit
from saelab.reproduce.curves import by_budget, verdict, verdicts
from saelab.reproduce.lab import Lab, Record, Spec, table, train_spec, values
from saelab.reproduce.ledger import Row, Verdict, all_of, attributed, below, decided, fewer, paired, summary
from saelab.reproduce.planted_worlds import World
from saelab.sae import SAE
from saelab.training import TrainConfig

PAPER = "choice"
LABELS = ("topk", "batch_topk", "mutual_choice", "feature_choice")


def synthetic(folder: Path, seeds: Sequence[int], quick: bool) -> list[Row]:
    """Planted features with Zipf frequencies and twice as many latents: those of rare features are easily lost."""
    n, d, k, width = 128, 48, 4, 256
    dead: dict[str, list[float]] = {v: [] for v in LABELS}
    fvu: dict[str, list[float]] = {v: [] for v in LABELS}
    l0: dict[str, list[float]] = {v: [] for v in LABELS}
    for seed in seeds:
        planted = Planted(d, n, l0=3, zipf=1.0, noise=0.02, seed=seed)
        world = World.make(folder / f"zipf-{seed}", planted, 40_000 if quick else 50_000, seed, n_test=20_000)
        for variant in LABELS:
            config = TrainConfig(epochs=4 if quick else 5, batch_size=512, lr=2e-3, seed=seed, data_seed=seed)
            sae = train_spec(Spec(variant, variant, width, {"k": k}, seed), world.cache, config)
            counts, code = FiringCounts(sae.d_sae), sae.encode(world.x).detach()
            counts.update(code)
            recon = sae.decode(code).detach()
            dead[variant].append(counts.estimates()["dead_fraction"].value)
            l0[variant].append(float(code.l0().double().mean()))
            fvu[variant].append(float(losses.fvu(world.x, recon)))
    measured = {name: {v: summary(x) for v, x in values.items()}
                for name, values in (("dead_fraction", dead), ("fvu", fvu), ("l0", l0))}  # fmt: skip
    setting = (
        f"{n} planted features with Zipf frequencies in {d} dimensions, {width} latents, k={k}, {len(seeds)} seeds"
    )
    mutual = {baseline: paired(dead["mutual_choice"], dead[baseline]) for baseline in ("topk", "batch_topk")}
    feature = paired(dead["feature_choice"], dead["topk"])
    return [
        Row(PAPER, "Mutual Choice has fewer dead latents than TopK", setting,
            {**measured, "difference": mutual["topk"], "difference_to_batch_topk": mutual["batch_topk"]},
            attributed(below(mutual["topk"]), below(mutual["batch_topk"])),
            "silent on 20,000 fresh tokens under the inference threshold; whole interval below zero, and below that of "
            "BatchTopK, which has the same allocation without the paper's loss",
            synthetic=True, expected="not attributable"),
        Row(PAPER, "Feature Choice has no dead latents", setting,
            {"dead_fraction": measured["dead_fraction"]["feature_choice"], "difference": feature},
            _none_dead(dead["feature_choice"]),
            "silent on 20,000 fresh tokens under the per-latent inference thresholds, in every seed",
            synthetic=True),
    ]  # fmt: skip


def _none_dead(shares: Sequence[float]) -> Verdict:
    return decided(max(shares) == 0)


def specs(lab: Lab, seeds: Sequence[int]) -> list[Spec]:
    """The two choice variants, TopK, and BatchTopK, which is Mutual Choice without its extra loss."""
    return [Spec(v, v, lab.scale.d_sae, {"k": k}, seed) for seed in seeds for k in lab.scale.ks for v in LABELS]


def real(lab: Lab, seeds: Sequence[int]) -> list[Row]:
    """The claims on a language model's activations."""
    records = lab.measure(specs(lab, seeds))
    setting = f"{lab.cache.manifest.model} {lab.cache.hook_name}, d_sae={lab.scale.d_sae}, k in {lab.scale.ks}"
    shares = [r.metrics["dead_fraction"] for r in records if r.spec.label == "feature_choice"]
    window = f"on held-out and {lab.scale.density_tokens:,} training tokens, thresholds of inference"
    k = min(lab.scale.ks)
    dead = {b: by_budget(records, "mutual_choice", b, "dead_fraction")[str(k)] for b in ("topk", "batch_topk")}
    small = [r for r in records if r.spec.budget == k]
    fewer_dead: list[Verdict] = [fewer(gap, values(small, b, "dead_fraction")) for b, gap in dead.items()]
    columns = ("l0", "fvu", "dead_fraction", "ce_loss_recovered_zero", "kl_div_with_sae")
    return [
        Row(PAPER, "Mutual Choice has fewer dead latents than TopK", f"{setting}; k={k}",
            {"dead_fraction_difference": dead, "table": table(records, columns)},
            attributed(fewer_dead[0], fewer_dead[1]),
            f"silent {window}; at the smallest budget, where most die; BatchTopK has the same allocation without the "
            "paper's loss, so that what it shares is not the paper's", shows="dead_fraction_difference.topk"),
        Row(PAPER, "Feature Choice has no dead latents", f"{setting}; k={k}",
            {"dead_fraction": summary(shares), "largest": max(shares)},
            "floor" if fewer_dead[0] == "floor" else decided(max(shares) == 0),
            f"silent {window}, in every seed and at every k; TopK must have some at the smallest budget"),
        *(_reconstruction(records, variant, setting) for variant in LABELS[2:]),
        _zipf(lab, records, setting),
    ]  # fmt: skip


def _reconstruction(records: Sequence[Record], variant: str, setting: str) -> Row:
    gaps = {b: by_budget(records, variant, b, "fvu") for b in ("topk", "batch_topk")}
    name = variant.replace("_", " ").title()
    return Row(
        PAPER, f"{name} has lower FVU than TopK at equal L0", setting,
        {"fvu_difference": gaps, "verdicts": {b: verdicts(gap, "below") for b, gap in gaps.items()}},
        attributed(verdict(gaps["topk"], "below"), verdict(gaps["batch_topk"], "below")),
        "on held-out documents, at every budget; a gain that BatchTopK shares is not the paper's",
        shows=f"fvu_difference.topk.{max(gaps['topk'], key=int)}",
    )  # fmt: skip


def _zipf(lab: Lab, records: Sequence[Record], setting: str) -> Row:
    """Zipf's law against a lognormal, which has as many parameters, and against the densities before training."""
    k = lab.papers_k
    fits: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        spec = record.spec
        if spec.label in ("topk", "mutual_choice") and spec.budget == k:
            sae = lab.sae(spec)
            for label, one in ((spec.label, sae), (f"{spec.label}_untrained", untrained(sae, lab.cache, spec.seed))):
                density = densities(lab, one)
                fit = zipf_fit(density, offset=False).row()
                fits.setdefault(label, []).append({**fit, "r2_lognormal": lognormal_r2(density)})
    names = ("r2", "s", "r2_lognormal")
    measured: dict[str, Any] = {
        label: {name: summary([f[name] for f in rows]) for name in names}
        | {"breaks_at": [f["breaks_at"] for f in rows], "alive": [f["n_alive"] for f in rows]}
        for label, rows in fits.items()
    }
    over = {label: paired([f["r2_lognormal"] for f in rows], [f["r2"] for f in rows]) for label, rows in fits.items()}
    more = paired([f["r2"] for f in fits["topk_untrained"]], [f["r2"] for f in fits["topk"]])
    measured |= {"lognormal_difference": over, "untrained_difference": more}
    return Row(
        PAPER, "densities follow Zipf's law except at their low end", setting + f", k={k}", measured,
        attributed(all_of([below(over["topk"]), below(over["mutual_choice"])]), below(more)),
        "Zipf's law (two parameters) fitted to the upper 80 % of living latents must fit better than a lognormal (two "
        "parameters), whole 95 % interval of the difference of R^2, and better than before training; breaks_at is the "
        "rank beyond which densities stay below half the law", shows="lognormal_difference.topk",
    )  # fmt: skip


def densities(lab: Lab, sae: SAE) -> np.ndarray:
    """Firing densities on ``density_tokens`` training rows."""
    counts = FiringCounts(sae.d_sae)
    count_firing(sae, lab.cache, counts, lab.scale.density_tokens)
    return counts.density.numpy()
