"""``attribute``: what caused a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from saelab.attribution import ablation
from saelab.attribution.building import choose, find_edges
from saelab.attribution.effects import Effects, measure
from saelab.attribution.frozen import Frozen, caps
from saelab.attribution.graph import AttributionGraph
from saelab.attribution.passes import Passes, Text
from saelab.attribution.places import Place, find_places
from saelab.attribution.target import Of, Target, find_target
from saelab.errors import UserError
from saelab.lm.fingerprint import model_dtype
from saelab.lm.limits import check_length, check_tokens
from saelab.lm.loading import model_name
from saelab.lm.offload import device_of, is_offloaded
from saelab.lm.record import check_weights, load_recorded
from saelab.lm.sites import underlying
from saelab.lm.structure import blocks
from saelab.lm.tokens import decode_each, token_ids, tokenizer_of
from saelab.lm.unwrapped import has_hooks, plain_model
from saelab.runs import Run, as_run
from saelab.runs.language_model import model_record
from saelab.sae import SAE

Mode = Literal["auto", "gradient", "frozen"]
MOST = 512  # tokens of a prompt
TOLERANCE = 2e-5  # of the sum of a frozen model's effects, relative to their sizes


@dataclass(frozen=True)
class AttributeConfig:
    """How a prediction is explained, and how much of the explanation is kept."""

    of: Of = "logit"
    """What is explained: the token's logit relative to the mean of all logits, or its log-probability."""
    mode: Mode = "auto"
    """gradient: effects in the model as it is, to first order. frozen: attention patterns and norms held, MLPs replaced
    by transcoders or cut out, so that effects add up exactly. auto: frozen where transcoders replace every MLP."""
    integrated: int = 0
    """Steps of integrated gradients; 0 takes activation x gradient."""
    keep: float = 0.8
    """Share of each place's influence (summed magnitudes of effects) that the kept nodes must have."""
    max_nodes: int = 120
    """Most latents and error terms to keep, over all places."""
    check: int = 10
    """Strongest latents to ablate one by one, for comparison."""
    skip_first: int = 1
    """Positions at the start that are left whole, because SAEs are trained without them."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError(f"keep={self.keep} is a share of the influence, above 0 and at most 1")
        if self.max_nodes < 1:
            raise UserError(f"max_nodes={self.max_nodes} must be at least 1")
        if self.integrated < 0 or self.check < 0 or self.skip_first < 0:
            raise UserError(
                f"integrated={self.integrated}, check={self.check} and skip_first={self.skip_first} must be 0 or more"
            )
        if self.mode not in ("auto", "gradient", "frozen"):
            raise UserError(f"mode={self.mode!r} is not one of auto, gradient, frozen")
        if self.mode == "frozen" and self.integrated:
            raise UserError("a frozen model is linear, so that integrated gradients change nothing; leave them out")


def attribute(
    runs: Run | SAE | Path | str | Sequence[Run | SAE | Path | str],
    prompt: str,
    target: str | int | None = None,
    *,
    against: str | int | None = None,
    model: nn.Module | None = None,
    config: AttributeConfig | None = None,
    tokenizer: Any = None,
    any_weights: bool = False,
    **options: Any,
) -> AttributionGraph:
    """Explain the token after ``prompt``: the effect of every latent at every position, and which latents fed which.

    Args:
        runs: One SAE or transcoder, or one for each of several places.
        target: The token to explain, as text (its first token) or id; by default the likeliest.
        against: Another token; then the difference of the two logits is explained.
        model: A bridge or a plain Hugging Face model; by default the one that the runs record.
        config: How; ``options`` are its fields.
        any_weights: Accept a model whose weights are not those that the runs record.

    Raises:
        UserError: A run of another model, a place that cannot be replaced, two runs at one place, a prompt without
            tokens or longer than the model's positions, a model that cannot be frozen.
    """
    config = AttributeConfig(**options) if config is None else config
    opened = [as_run(run) for run in ([runs] if isinstance(runs, Run | SAE | Path | str) else runs)]
    if not opened:
        raise UserError("attribution needs at least one SAE; name a run folder")
    records = [(model_record(run), f"the SAE {run.name or run.hook_name}") for run in opened]
    if model is None:
        model = cast(nn.Module, load_recorded(*records[0], any_weights=any_weights))
    for record, what in records:
        check_weights(model, record, what, any_weights)
    tokenizer = tokenizer_of(model, tokenizer)
    text = _text(model, tokenizer, prompt, config)
    runs_on = _fast(model, text.ids)
    places, logits = find_places(runs_on, opened, text.ids.to(device_of(runs_on)))
    chosen, notes = find_target(tokenizer, prompt, text.ids[0].tolist(), logits, target, against, config.of)
    frozen = _is_frozen(runs_on, places, config.mode, chosen)
    passes = Passes(runs_on, places, text, Frozen() if frozen else None)
    value = float(chosen.value(logits[None]))
    if frozen and caps(runs_on):
        notes.append("the model caps its logits, which is not linear: the logit before the cap is explained")
        with torch.no_grad():
            value = float(chosen.value(passes.logits()))
    effects = measure(passes, chosen, value, config.integrated)
    size = max(1.0, sum(map(abs, effects.sums().values())))
    if frozen and abs(effects.gap) > size * max(TOLERANCE, 4 * torch.finfo(model_dtype(model)).eps):
        raise UserError(
            f"{type(underlying(model)).__name__} is not linear with attention and norms frozen: the effects add up to "
            f"{effects.value - effects.gap:.4g}, the target is {effects.value:.4g}; use --mode gradient"
        )
    graph = _graph(passes, chosen, effects, config, notes)
    graph.prompt, graph.model = prompt, model_name(model)[0]
    graph.probability = float(logits.float().softmax(dim=0)[chosen.token])
    if config.check:
        graph.checks = ablation.check(graph, passes, chosen, config.check)
    graph.faithfulness = ablation.faithfulness(graph, passes, chosen)
    return graph


def _text(model: nn.Module, tokenizer: Any, prompt: str, config: AttributeConfig) -> Text:
    if not prompt or not token_ids(tokenizer, prompt, bos=False):
        raise UserError("the prompt is empty; type at least one word")
    ids = token_ids(tokenizer, prompt)
    if len(ids) > MOST:
        raise UserError(f"the prompt has {len(ids)} tokens, more than {MOST}; shorten it")
    tensor = torch.tensor([ids])
    check_tokens(model, tensor, tokenizer)
    check_length(model, len(ids), "the prompt")
    if len(ids) <= config.skip_first:
        raise UserError(
            f"the prompt has {len(ids)} token, and the first {config.skip_first} are left whole; write a longer one"
        )
    return Text(tensor, decode_each(tokenizer, ids), config.skip_first)


def _fast(model: nn.Module, ids: Tensor) -> nn.Module:
    """The plain model over a bridge's weights where it predicts the same, else the model itself."""
    if underlying(model) is model or has_hooks(cast(Any, model)):
        return model
    plain = plain_model(cast(Any, model))
    if plain is None:
        return model
    text = Text(ids, [], 0)
    with torch.no_grad():
        a, b = Passes(model, [], text).logits().float(), Passes(plain, [], text).logits().float()
    close = float((a - b).norm() / a.norm()) <= 64 * torch.finfo(next(plain.parameters()).dtype).eps ** 0.75
    return plain if close else model


def _is_frozen(model: nn.Module, places: Sequence[Place], mode: Mode, target: Target) -> bool:
    if is_offloaded(model):  # the bias of a layer is read anew in each pass, and has no one gradient
        if mode == "frozen":
            raise UserError("a model that is offloaded or divided cannot be frozen; use --mode gradient")
        return False
    if mode == "auto":
        inside = sum(not place.route.same for place in places)
        return target.is_linear and inside >= len(blocks(model)[1])
    if mode == "frozen" and not target.is_linear:
        raise UserError("a log-probability is not linear in the logits; explain a logit, or use --mode gradient")
    return mode == "frozen"


def _graph(
    passes: Passes, target: Target, effects: Effects, config: AttributeConfig, notes: list[str]
) -> AttributionGraph:
    frozen = passes.freeze is not None
    chosen = choose(effects, passes.text, config.keep, config.max_nodes)
    edges, lost = find_edges(passes, target, effects, chosen)
    if lost:
        notes.append(f"{len(lost)} nodes have no edges: rounding changes which latents fire ({', '.join(lost[:3])})")
    short = [s for s in chosen.summaries if s.kept_share < config.keep - 1e-9]
    if short:
        notes.append(
            f"the most nodes, {config.max_nodes}, keep {min(s.kept_share for s in short):.0%} of the influence at "
            f"{len(short)} of {len(chosen.summaries)} places, not {config.keep:.0%}; allow more to keep more"
        )
    return AttributionGraph(
        prompt="",
        tokens=passes.text.strings,
        token_ids=passes.text.ids[0].tolist(),
        model="",
        target=target.name,
        target_token=target.token,
        target_text=target.text,
        value=effects.value,
        probability=0.0,
        mode="frozen" if frozen else "gradient",
        integrated=config.integrated,
        keep=config.keep,
        places=chosen.summaries,
        nodes=chosen.nodes,
        edges=edges,
        sums=effects.sums() if frozen else {},
        drift=effects.drift,
        notes=notes,
        runs=[place.run for place in passes.places],
    )
