"""AbsTopK (Zhu, Khalili and Zhu, 2025, arXiv 2510.00404) against TopK, and against BatchTopK on batches.

The rows called TopK and AbsTopK in the paper's repository both spend their budget over a batch, so both pairs are here.
The paper's k is a tenth of the width of the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saelab import losses
from saelab.data.synthetic import Planted
from saelab.errors import UserError
from saelab.evaluation.controls import untrained
from saelab.evaluation.tasks import passages as labelled
from saelab.evaluation.tasks import scr_tpp, two_sided
from saelab.evaluation.tasks.probing import sparse_probing
from saelab.reproduce import steering
from saelab.reproduce.curves import by_budget, verdict, verdicts
from saelab.reproduce.lab import Lab, Record, Spec, table, train_spec
from saelab.reproduce.ledger import Row, Verdict, above, all_of, attributed, below, paired, summary, within
from saelab.reproduce.planted_worlds import World
from saelab.training import TrainConfig

PAPER = "abs-topk"
MARGIN = 0.02  # of FVU, within which half as many signed latents count as no worse
PAIRS = (("abs_topk", "topk"), ("batch_abs_topk", "batch_topk"))  # a budget for each token, and over a batch


def synthetic(folder: Path, seeds: Sequence[int], quick: bool) -> list[Row]:
    """Signed planted features: one signed latent each, or two unsigned ones."""
    n, k, d = (32, 3, 48)
    epochs = 4 if quick else 5
    results: dict[str, list[dict[str, float]]] = {"abs_topk": [], "topk": [], "topk_double": []}
    for seed in seeds:
        planted = Planted(d, n, l0=3, zipf=0.3, signed=n, seed=seed)
        world = World.make(folder / f"signed-{seed}", planted, 40_000 if quick else 50_000, seed)
        for label, variant, width in (("abs_topk", "abs_topk", n), ("topk", "topk", n), ("topk_double", "topk", 2 * n)):
            config = TrainConfig(epochs=epochs, batch_size=256, lr=3e-3, seed=seed, data_seed=seed)
            sae = train_spec(Spec(label, variant, width, {"k": k}, seed), world.cache, config)
            fvu = float(losses.fvu(world.x, sae(world.x).detach()))
            l0 = float(sae.encode(world.x).l0().double().mean())
            results[label].append({"fvu": fvu, "l0": l0, **world.recovery(sae)})
    fvu = {label: [r["fvu"] for r in rows] for label, rows in results.items()}
    cosine = {label: [r["mcc"] for r in rows] for label, rows in results.items()}
    gap, half = paired(fvu["abs_topk"], fvu["topk"]), paired(fvu["abs_topk"], fvu["topk_double"])
    recovered = paired(cosine["abs_topk"], cosine["topk"])
    setting = f"{n} planted features of either sign in {d} dimensions, k={k}, {len(seeds)} seeds"
    return [
        Row(
            PAPER,
            "a signed latent stands for two unsigned ones: lower FVU at equal width and k",
            setting,
            {"fvu": {label: summary(v) for label, v in fvu.items()}, "fvu_difference": gap, "mcc_difference": recovered,
             "l0": {label: summary([r["l0"] for r in rows]) for label, rows in results.items()}},
            all_of([below(gap), above(recovered)]),
            "paired differences over seeds to TopK of the same width: FVU below zero and correlation with the planted "
            "activations above zero with their whole 95 % intervals",
            synthetic=True,
        ),
        Row(
            PAPER,
            "half as many signed latents reconstruct no worse than TopK at full width",
            setting + f"; AbsTopK with {n} latents, TopK with {2 * n}",
            {"fvu_difference": half},
            within(half, MARGIN),
            f"the paired FVU difference to TopK of twice the width, its whole interval, is below {MARGIN}",
            synthetic=True,
        ),
    ]  # fmt: skip


def specs(lab: Lab, seeds: Sequence[int]) -> list[Spec]:
    """Both pairs at equal width, and AbsTopK at half of it with the paper's k."""
    d_sae = lab.scale.d_sae
    curves = [("topk", "topk", {}), ("abs_topk", "abs_topk", {}), ("batch_topk", "batch_topk", {})]
    curves.append(("batch_abs_topk", "batch_topk", {"signed": True}))
    out = [
        Spec(label, variant, d_sae, {"k": k, **options}, seed)
        for seed in seeds for k in lab.scale.ks for label, variant, options in curves
    ]  # fmt: skip
    return [*out, *(Spec("abs_topk_half", "abs_topk", d_sae // 2, {"k": lab.papers_k}, seed) for seed in seeds)]


def second(lab: Lab, seeds: Sequence[int]) -> list[Row]:
    """The first claim on another model, at the smallest budget and at the paper's."""
    at = lab.papers_k
    ks = sorted({min(lab.scale.ks), at})
    records = lab.measure(
        [Spec(v, v, lab.scale.d_sae, {"k": k}, seed) for seed in seeds for k in ks for v in ("topk", "abs_topk")]
    )
    setting = f"{lab.cache.manifest.model} {lab.cache.hook_name}, d_sae={lab.scale.d_sae}, k in {ks}"
    return [_reconstruction(records, PAIRS[0], at, setting)]


def real(lab: Lab, seeds: Sequence[int]) -> list[Row]:
    """The claims on a language model's activations."""
    records = lab.measure(specs(lab, seeds))
    setting = f"{lab.cache.manifest.model} {lab.cache.hook_name}, d_sae={lab.scale.d_sae}, k in {lab.scale.ks}"
    at = lab.papers_k
    rows = [_reconstruction(records, pair, at, setting) for pair in PAIRS]
    if lab.model is not None:
        rows += [_loss(records, pair, at, setting) for pair in PAIRS]
    rows += [_half_width(records, at, setting), _two_sided(lab, seeds, setting), _causal(lab, seeds, setting)]
    signed, plain = ([Spec(label, label, lab.scale.d_sae, {"k": at}, seed) for seed in seeds] for label in PAIRS[0])
    bench, where = steering.Bench(lab), f"{setting}, k={at}"
    rows.append(steering.against_means(bench, "abs_topk", signed, PAPER, where))
    rows.append(steering.one_latent_both_ways(bench, signed, plain, PAPER, where))
    return rows


def _kind(pair: tuple[str, str]) -> str:
    return "TopK" if pair == PAIRS[0] else "BatchTopK, both with a budget over the batch"


def _reconstruction(records: Sequence[Record], pair: tuple[str, str], at: int, setting: str) -> Row:
    gap = by_budget(records, *pair, "fvu")
    measured = {"fvu_difference": gap, "verdicts": verdicts(gap, "below"),
                "table": table(records, ("l0", "fvu", "dead_fraction", "cosine"))}  # fmt: skip
    reason = f"FVU on held-out documents; the verdict is that at the paper's k, a tenth of the width, here {at}"
    return Row(
        PAPER, f"lower FVU than {_kind(pair)} at equal L0", setting, measured, verdict(gap, "below", at), reason,
        shows=f"fvu_difference.{at}",
    )  # fmt: skip


def _loss(records: Sequence[Record], pair: tuple[str, str], at: int, setting: str) -> Row:
    gaps = {m: by_budget(records, *pair, m) for m in ("ce_loss_recovered_zero", "kl_div_with_sae")}
    columns = ("l0", "ce_loss_with_sae", "ce_loss_recovered_zero", "ce_loss_recovered_mean", "kl_div_with_sae")
    recovered = gaps["ce_loss_recovered_zero"]
    return Row(
        PAPER, f"higher cross-entropy recovered than {_kind(pair)} at equal L0", setting,
        {**gaps, "verdicts": verdicts(recovered, "above"), "table": table(records, columns)},
        verdict(recovered, "above", at),
        f"share recovered (zero ablation) on contexts of all held-out documents; the verdict is that at k={at}",
        shows=f"ce_loss_recovered_zero.{at}",
    )  # fmt: skip


def _half_width(records: Sequence[Record], at: int, setting: str) -> Row:
    gap = by_budget(records, "abs_topk_half", "topk", "fvu")[str(at)]
    found: Verdict = "inconclusive" if gap["low"] is None else within(gap, MARGIN)
    return Row(
        PAPER, "control: half as many signed latents, equal k, still reconstruct no worse than TopK",
        f"{setting}; k={at}", {"fvu_difference": gap}, found,
        f"AbsTopK at half the width has as many poles as TopK has latents; no worse: by less than {MARGIN} of FVU",
    )  # fmt: skip


def _two_sided(lab: Lab, seeds: Sequence[int], setting: str) -> Row:
    k = lab.papers_k
    found: dict[str, list[dict[str, float]]] = {"abs_topk": [], "topk": [], "abs_topk_untrained": []}
    for seed in seeds:
        saes = {v: lab.sae(Spec(v, v, lab.scale.d_sae, {"k": k}, seed)) for v in ("abs_topk", "topk")}
        saes["abs_topk_untrained"] = untrained(saes["abs_topk"], lab.cache, seed)
        for label, sae in saes.items():
            firings = two_sided.collect(sae, lab.cache, lab.scale.density_tokens)
            rows = two_sided.two_sidedness(sae, firings, seed)
            found[label].append({name: e.value for name, e in rows.items()})
    share = {label: [r["two_sided_fraction"] for r in rows] for label, rows in found.items()}
    apart = {label: [r.get("pole_separation", 0.0) for r in rows] for label, rows in found.items()}
    gaps = {
        "two_sided_fraction_difference_to_topk": paired(share["abs_topk"], share["topk"]),
        "pole_separation_difference_to_untrained": paired(apart["abs_topk"], apart["abs_topk_untrained"]),
    }
    measured: dict[str, Any] = {**gaps, "two_sided_fraction": {name: summary(v) for name, v in share.items()}}
    measured["pole_separation_bits"] = {name: summary(v) for name, v in apart.items()}
    to_topk, to_untrained = map(above, gaps.values())
    return Row(
        PAPER, "more two-sided latents than opposite pairs in TopK, poles that fire in different contexts",
        f"{setting}; k={k}", measured, attributed(all_of([to_topk, above(summary(apart["abs_topk"]))]), to_untrained),
        "share of latents using both poles against the share of TopK latents in pairs with cosine below -0.7, and the "
        "poles' token distributions apart by more than a random split, which must exceed that of the same SAE before "
        "training; whether both poles mean something (29.7 % in the paper, judged by a language model) is not tested",
        shows="pole_separation_difference_to_untrained",
    )  # fmt: skip


def _causal(lab: Lab, seeds: Sequence[int], setting: str) -> Row:
    k = lab.papers_k
    scores: dict[str, list[dict[str, float]]] = {"abs_topk": [], "topk": []}
    data = labelled.from_cache(lab.cache, lab.decode, passage_tokens=lab.scale.passage_tokens, split="held_out")
    claim, setting = (
        "SCR and TPP above TopK",
        f"{setting}, k={k}, passages of {lab.scale.passage_tokens} held-out tokens",
    )
    try:
        for label, into in scores.items():
            for seed in seeds:
                sae = lab.sae(Spec(label, label, lab.scale.d_sae, {"k": k}, seed))
                into.append(_tasks(lab, labelled.pool(sae, data), data, seed))
    except UserError as error:  # labels that this text does not have
        return Row(PAPER, claim, setting, {}, "not testable here", str(error))
    names = sorted(set.intersection(*(set(r) for rows in scores.values() for r in rows)))
    measured = {n: {label: summary([r[n] for r in rows]) for label, rows in scores.items()} for n in names}
    gaps = {n: paired([r[n] for r in scores["abs_topk"]], [r[n] for r in scores["topk"]])
            for n in ("tpp_20", "tpp_20_whole_latents", "scr_20", "scr_20_whole_latents") if n in names}  # fmt: skip
    return Row(
        PAPER, claim, setting + ": article, and year written or not", {**measured, "differences": gaps},
        all_of([above(g) for g in gaps.values()]) if len(gaps) == 4 else "not testable here",
        "20 ablated poles, and 20 whole latents, SAEBench's unit, of which both must say so; " + scr_tpp.AUDIT,
    )  # fmt: skip


def _tasks(lab: Lab, pooled: labelled.Pooled, data: labelled.Passages, seed: int) -> dict[str, float]:
    tpp = scr_tpp.tpp(pooled, data, "article", seed=seed)
    probing = sparse_probing(pooled, data, "article", seed=seed)
    names = {"probe_top_5": "sae_top_5", "probe_dense": "dense_probe", "probe_random_direction": "random_direction",
             "probe_difference_of_means": "difference_of_means"}  # fmt: skip
    found = {own: probing[f"{name}_test_accuracy"].value for own, name in names.items()}
    found |= _scores("tpp", tpp)
    if lab.decode is not None:
        scr = scr_tpp.scr_over_classes(pooled, data.column("article"), data.column("year"), seed=seed)
        found |= _scores("scr", scr)
        found |= {"scr_difference_of_means": scr["score_difference_of_means"], "scr_tasks": float(scr["tasks"])}
    return found


def _scores(name: str, found: dict[str, Any]) -> dict[str, float]:
    # An unsigned latent is its one pole.
    whole = found.get("whole_latents", found)
    return {f"{name}_20": found["score"][20], f"{name}_20_random": found["score_random_latents"][20],
            f"{name}_20_whole_latents": whole["score"][20]}  # fmt: skip
