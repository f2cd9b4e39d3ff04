"""Choose the latent that steers towards a concept: by what it does to the predictions, beside what it fires on.

Not every latent that fires on a concept writes it (Arad et al., 2025, arXiv 2505.20063). Three scores tell them apart.

*Input score*: from contrast texts, with ``m`` the mean magnitude of the latent over the tokens of a text,

    (mean m over the positive texts - mean m over the negative ones) / (sum of both root mean squares)

which is 1 for a latent that fires equally in each positive text and in no negative one, and low for one that fires in a
single text. *Output score*: the share of the promoted logits that falls on the concept's tokens, by the logit lens.
*Effect*: what the latent does in the model at a small dose: how much it raises the logarithm of the concept's
probability, over the square root of the KL divergence that it costs. Since the first grows with the dose and the second
with its square, this does not depend on the dose as long as it is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.gradients import gradient_of
from saelab.lm.offload import device_of, weight_of
from saelab.lm.sites import check_replaceable, locate, underlying
from saelab.lm.tokens import Prompts, token_ids, token_text, tokenize, tokenizer_of
from saelab.lm.unwrapped import frozen
from saelab.runs import Run, as_run
from saelab.sae import SAE
from saelab.steering.attachment import attach
from saelab.steering.evaluation.concepts import Concept
from saelab.steering.generation import forward
from saelab.steering.measure.calibration import activation_norm
from saelab.steering.measure.effects import UnsteeredBaseline, concept_tokens
from saelab.steering.neutral import NEUTRAL
from saelab.steering.operations import Add
from saelab.steering.vectors import SteeringVector

DOSE = 0.2  # of the activations' root mean square norm
CONTROLS = 4  # random directions


@dataclass(frozen=True)
class Candidate:
    """One pole of one latent and its scores; None for what could not be measured."""

    latent: int
    pole: int
    input_score: float | None  # -1 .. 1; None without contrast texts
    fires_on: tuple[int, int] | None  # how many of the positive and of the negative texts it fires in
    output_score: float | None  # 0 .. 1; None where the logit lens does not apply
    slope: float  # of the logarithm of the concept's probability, per unit of length, at dose 0
    effect: float  # of the logarithm of the concept's probability at the dose, over the square root of the KL
    times: float  # by which the concept's probability grows at the dose
    kl: float  # nats per token at the dose
    promotes: tuple[str, ...]  # the tokens of the concept whose logits it raises most


@dataclass(frozen=True)
class Ranking:
    """Candidates, the best first, and the effects of random directions of the same length."""

    concept: str
    tokens: tuple[str, ...]
    candidates: list[Candidate]
    dose: float  # length that was added, in units of the activations
    controls: list[float]

    @property
    def best(self) -> Candidate:
        """The candidate with the largest effect. Raises UserError where none has one."""
        if not self.candidates or self.candidates[0].effect <= 0:
            raise UserError(f"no latent of this SAE makes {self.concept!r} likelier; try other words or another SAE")
        return self.candidates[0]

    @property
    def reason(self) -> str:
        """Why the best one was chosen, in one sentence or two."""
        best = self.best
        parts = [f"multiplies the probability of {self.concept!r} by {best.times:.2g} at a KL of {best.kl:.2g} nats"]
        if best.fires_on is not None:
            parts.append(f"fires in {best.fires_on[0]} texts about it and in {best.fires_on[1]} contrast texts")
        if best.promotes:
            parts.append("promotes " + " ".join(f"‘{text}’" for text in best.promotes[:4]))
        sign = "" if best.pole > 0 else " −"
        text = f"latent {best.latent}{sign} " + ", ".join(parts)
        beside = max(self.controls, default=-math.inf)
        if best.effect <= beside:
            text += f"; of {len(self.controls)} random directions one does as much: do not trust this choice"
        return text

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def rank_latents(
    model: nn.Module,
    run: Run | SAE | Path | str,
    concept: Concept,
    prompts: Prompts = NEUTRAL,
    *,
    candidates: int = 24,
    dose: float = DOSE,
    hook_name: str = "",
    tokenizer: Any = None,
    seed: int = 0,
) -> Ranking:
    """Rank the latents of an SAE by what adding them does to the probability of a concept's words on ``prompts``.

    Half of the ``candidates`` are those with the largest slope at dose 0, which one backward pass gives for all
    latents; the others are the best by input score and by output score. Each is then added at the length ``dose`` times
    the root mean square norm of the activations. Raises UserError for a concept without words and texts.
    """
    source = as_run(run, hook_name)
    tokenizer = tokenizer_of(model, tokenizer)
    tokens = word_tokens(tokenizer, concept.vocabulary)
    baseline = UnsteeredBaseline(model, prompts, tokens.tolist(), tokenizer=tokenizer)
    rows, latents = unit_directions(source.sae), source.sae.n_features
    slopes = _both_poles(rows @ slope(model, source.hook_name_out, baseline).to(rows), source.sae.signed)
    read = input_scores(model, source, concept, tokenizer) if concept.positive else None
    written = _output(model, source, tokens)
    scores = {"slope": slopes, "input": None if read is None else read.score, "output": written}
    length = dose * norm_at(model, source, baseline.prompts, tokenizer)
    before = float(baseline.measure([]).mass_before.mean())
    found = []
    for slot in _shortlist(scores, candidates, len(rows), latents):
        pole, latent = (1, slot) if slot < len(rows) else (-1, slot - len(rows))
        times, kl, effect = _at_dose(baseline, source, pole * rows[latent], length, before)
        found.append(
            Candidate(
                latent, pole,
                None if read is None else float(read.score[slot]),
                None if read is None else (int(read.fires[0][slot]), int(read.fires[1][slot])),
                None if written is None else float(written[slot]),
                float(slopes[slot]), effect, times, kl,
                _promoted(model, tokenizer, pole * rows[latent], tokens) if written is not None else (),
            )
        )  # fmt: skip
    found.sort(key=lambda c: -c.effect)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(CONTROLS, rows.shape[1], generator=generator).to(rows)
    controls = [_at_dose(baseline, source, row / row.norm(), length, before)[2] for row in drawn]
    return Ranking(concept.name, tuple(token_text(tokenizer, t) for t in tokens.tolist()), found, length, controls)


def norm_at(model: nn.Module, run: Run, texts: Prompts, tokenizer: Any = None) -> float:
    """Root mean square norm of the activations where the SAE writes: recorded, or measured on ``texts``."""
    if run.rms_norm and run.hook_name_out == run.hook_name:
        return run.rms_norm
    return activation_norm(model, run.hook_name_out, texts, tokenizer=tokenizer)


def word_tokens(tokenizer: Any, words: Sequence[str]) -> Int[Tensor, " tokens"]:
    """The tokens that are one of the words, alone, after a space or with a capital letter.

    A word of several tokens counts only where no word is a single one: the first tokens of "theorem" begin many words.
    """
    forms = [form for word in words for form in (word, f" {word}", word.capitalize(), f" {word.capitalize()}")]
    single = {row[0] for row in (token_ids(tokenizer, form, bos=False) for form in forms) if len(row) == 1}
    single -= {getattr(tokenizer, "unk_token_id", None)}
    found = torch.tensor(sorted(single), dtype=torch.int64) if single else concept_tokens(tokenizer, list(words))
    if not found.numel():
        raise UserError(f"the tokenizer has no token for {', '.join(words)}; give other words")
    return found


def unit_directions(sae: SAE) -> Float[Tensor, "d_sae d_in"]:
    """The rows of the decoder with norm 1; a row of zeros stays one."""
    rows = sae.W_dec.detach().float()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def slope(model: nn.Module, hook_name: str, baseline: UnsteeredBaseline) -> Float[Tensor, " d_in"]:
    """The gradient of the logarithm of the concept's mean probability by a vector added on every token."""
    site, root, device = check_replaceable(locate(model, hook_name)), underlying(model), device_of(model)
    ids, mask = (t.to(device) for t in tokenize(baseline.tokenizer, baseline.prompts))
    added: list[Tensor] = []

    def add(x: Tensor) -> Tensor:
        added.append(torch.zeros(x.shape[-1], device=x.device, dtype=x.dtype, requires_grad=True))
        return x + added[0]

    with frozen(root), torch.enable_grad(), attach(model, []), site.register(model, add):
        logits = forward(root, ids, mask)[0]
        mass = logits.float().softmax(-1)[..., baseline.concept.to(logits.device)].sum(-1)
        mean = ((mass * mask.to(mass)).sum(1) / mask.sum(1).to(mass)).mean()
        return gradient_of(mean.log(), added[0]).float().cpu()


@dataclass(frozen=True, eq=False)
class Reading:
    """What the latents fire on, one entry per latent and then, for a signed SAE, one per latent's negative pole."""

    score: Float[Tensor, " slots"]
    fires: tuple[Int[Tensor, " slots"], Int[Tensor, " slots"]]  # in how many positive and negative texts


def input_scores(model: nn.Module, run: Run, concept: Concept, tokenizer: Any = None) -> Reading:
    """How much more the latents fire in the concept's positive texts than in its negative ones."""
    pos, neg = (_mean_activations(model, run, texts, tokenizer) for texts in (concept.positive, concept.negative))
    rms = [part.square().mean(0).sqrt() for part in (pos, neg)]
    score = (pos.mean(0) - neg.mean(0)) / (rms[0] + rms[1]).clamp_min(1e-30)
    return Reading(score, ((pos > 0).sum(0), (neg > 0).sum(0)))


@torch.no_grad()
def _mean_activations(model: nn.Module, run: Run, texts: Sequence[str], tokenizer: Any) -> Float[Tensor, "texts slots"]:
    """Mean magnitude of each latent's poles over a text's tokens, without the first of them."""
    sae, root, device = run.sae, underlying(model), device_of(model)
    site, tokenizer = locate(model, run.hook_name), tokenizer_of(model, tokenizer)
    rows = []
    for text in texts:
        ids, mask = (t.to(device) for t in tokenize(tokenizer, text))
        seen: list[Tensor] = []
        with attach(model, []), site.register(model, lambda x, seen=seen: seen.append(x.clone())):
            forward(root, ids, mask, last_only=True)
        acts = seen[0][0, 1:] if seen[0].shape[1] > 1 else seen[0][0]
        code = sae.encode(acts.to(sae.W_dec))
        slots = code.indices + sae.d_sae * (code.values < 0)
        total = code.values.new_zeros(2 * sae.d_sae).index_add_(0, slots, code.values.abs())
        rows.append((total / len(acts)).float().cpu())
    return torch.stack(rows)[:, : sae.d_sae * (2 if sae.signed else 1)]


def _both_poles(values: Tensor, signed: bool) -> Tensor:
    values = values.float().cpu()
    return torch.cat([values, -values]) if signed else values


# By SAE and by loaded model: one name may stand for several revisions and precisions.
_PROMOTED: WeakKeyDictionary[SAE, WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def _output(model: nn.Module, run: Run, tokens: Tensor, n: int = 50) -> Tensor | None:
    """The output score of every slot; None where there is no logit lens for this model or place.

    What the latents promote is the same for every concept, and costs a product with the whole vocabulary: it is kept.
    """
    known, own = _PROMOTED.setdefault(run.sae, WeakKeyDictionary()), underlying(model)
    if own not in known:
        lens = _lens(model, run)
        if lens is None:
            return None
        rows = unit_directions(run.sae).cpu()
        poles = [rows, -rows] if run.sae.signed else [rows]
        parts = [lens.extremes(some, n)[0] for signed in poles for some in signed.split(512)]
        logits, ids = (torch.cat(column) for column in zip(*parts))
        known[own] = logits, ids
    logits, ids = known[own]
    logits = logits.clamp_min(0)
    return (logits * torch.isin(ids, tokens)).sum(1) / logits.sum(1).clamp_min(1e-30)


def _lens(model: nn.Module, run: Run) -> Any:
    from saelab.features import LogitLens
    from saelab.lm.unembed import unembedding

    try:
        lens = LogitLens(*unembedding(model))
    except UserError:
        return None
    return lens if lens.unembed.shape[0] == run.sae.W_dec.shape[1] else None


def _promoted(model: nn.Module, tokenizer: Any, direction: Tensor, tokens: Tensor, n: int = 4) -> tuple[str, ...]:
    weight: Any = underlying(model)
    head = weight.get_output_embeddings()
    if head is None or head.weight.shape[1] != direction.numel():
        return ()
    rows = weight_of(model, head).detach()
    raised = rows[tokens.to(rows.device)].float().cpu() @ direction.float().cpu()
    best = raised.topk(min(n, len(tokens)))
    return tuple(token_text(tokenizer, int(tokens[i])) for i, value in zip(best.indices, best.values) if value > 0)


def _shortlist(scores: dict[str, Tensor | None], candidates: int, rows: int, latents: int) -> list[int]:
    """Half by slope, the rest by the other scores in turns; each once, best first.

    Of the ``rows`` of the decoder the first ``latents`` are candidates; the rest is bookkeeping.
    """
    if candidates < 1:
        raise UserError(f"candidates={candidates} must be at least 1")
    ranked = {name: values.argsort(descending=True).tolist() for name, values in scores.items() if values is not None}
    known = {name: [slot for slot in order if slot % rows < latents] for name, order in ranked.items()}
    turns = ["slope", *(name for name in known if name != "slope")]
    if len(turns) > 1:
        turns = [name for other in turns[1:] for name in ("slope", other)]
    chosen: dict[int, None] = {}
    most = min(candidates, len(known["slope"]))
    while len(chosen) < most:
        for name in turns:
            if len(chosen) < most:
                chosen[next(slot for slot in known[name] if slot not in chosen)] = None
    return list(chosen)


def _at_dose(
    baseline: UnsteeredBaseline, run: Run, direction: Tensor, length: float, before: float
) -> tuple[float, float, float]:
    """By how much the concept's probability is multiplied, the KL, and the effect."""
    if not bool(direction.any()):
        return 1.0, 0.0, 0.0
    found = baseline.measure(Add(SteeringVector.from_tensor(direction, run.hook_name_out), length))
    times, kl = float(found.mass.mean()) / max(before, 1e-30), found.mean_kl
    return times, kl, math.log(max(times, 1e-30)) / math.sqrt(max(kl, 1e-12))
