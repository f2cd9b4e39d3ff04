"""Generate text with interventions: many prompts at once, token by token, or beside the unsteered model."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.limits import check_length, check_tokens
from saelab.lm.offload import device_of
from saelab.lm.padding import equally_long, lengths_of, masks_padding, padding_masked, unpadded
from saelab.lm.sites import underlying
from saelab.lm.tokens import Prompts, end_ids, tokenize, tokenizer_of, written_text
from saelab.steering.attachment import attach
from saelab.steering.interventions import Intervention
from saelab.steering.rows import part_of

COLDEST = 1e-30  # below it logits over the temperature are not finite in float32


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest."""

    max_new_tokens: int = 40
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0  # the same seed draws with the same random numbers, steered or not
    use_cache: bool = True
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be 0 or more")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be 0 (the likeliest token) or more, and finite")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is a probability, above 0 and at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Int[Tensor, " batch"]:
        """One token per row of ``logits [batch, vocabulary]``; UserError where a row is not a distribution."""
        # The maximum of a row is not finite where it holds a NaN or an infinity, and where all of it is minus infinity.
        if not bool(logits.amax(dim=-1).isfinite().all()):
            raise UserError(
                f"the model's logits are not finite in {str(logits.dtype).removeprefix('torch.')}: lower the strength, "
                "or load the model in float32 (--model-dtype float32)"
            )
        if self.temperature < COLDEST:
            return logits.argmax(dim=-1)
        probs = (logits.float() / self.temperature).softmax(dim=-1)
        ordered, tokens = probs.sort(dim=-1, descending=True)
        # The token that crosses top_p still belongs to the nucleus, so it is never empty.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
        picked = torch.multinomial(ordered.cpu(), 1, generator=generator).to(logits.device)
        return tokens.gather(-1, picked)[:, 0]


def generate(
    model: nn.Module,
    prompts: Prompts,
    interventions: Intervention | Sequence[Intervention] = (),
    *,
    tokenizer: Any = None,
    **sampling: Any,
) -> str | list[str]:
    """The model's continuation of each prompt, without the prompt. A single prompt gives a single string.

    ``sampling`` takes the fields of :class:`Sampling`; ``tokenizer`` is needed for a plain Hugging Face model. A text
    ends at any token that :func:`saelab.lm.tokens.end_ids` lists.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    ids, mask = tokenize(tokenizer, prompts)
    rows = generate_tokens(model, ids, mask, interventions, eos=end_ids(model, tokenizer), **sampling)
    texts = [written_text(tokenizer, row) for row in rows]
    return texts[0] if isinstance(prompts, str) else texts


def stream(
    model: nn.Module,
    prompt: str,
    interventions: Intervention | Sequence[Intervention] = (),
    *,
    tokenizer: Any = None,
    **sampling: Any,
) -> Iterator[str]:
    """The continuation of one prompt, piece by piece as it is generated."""
    tokenizer = tokenizer_of(model, tokenizer)
    ids, mask = tokenize(tokenizer, prompt)
    written: list[int] = []
    shown = ""
    with attach(model, interventions) as positions, positions.generating(ids.shape[1]):
        for tokens in token_steps(model, ids, mask, Sampling(**sampling), end_ids(model, tokenizer)):
            written.append(int(tokens[0]))
            text = written_text(tokenizer, written)  # a character may be spread over several tokens
            yield text[len(shown) :]
            shown = text


def generate_tokens(
    model: nn.Module,
    ids: Int[Tensor, "batch length"],
    mask: Int[Tensor, "batch length"] | None = None,
    interventions: Intervention | Sequence[Intervention] = (),
    *,
    eos: int | Sequence[int] | None = None,
    roles: Int[Tensor, "batch length"] | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """Token ids of each row's continuation, up to and without the first end-of-text token ``eos``, one or several.

    ``roles`` are those of a chat's tokens (:class:`saelab.steering.chat.EncodedChat`), for interventions on the answer
    or the instruction.
    """
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    mask = torch.ones_like(ids) if mask is None else mask
    if not bool(mask.all()) and not masks_padding(model):
        return _in_groups(model, ids, mask, interventions, roles, eos=eos, **sampling)
    settings = Sampling(**sampling)
    with attach(model, interventions) as positions, positions.generating(ids.shape[1], roles):
        steps = list(token_steps(model, ids, mask, settings, ends))
    rows = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in range(ids.shape[0])]
    if not settings.stop_at_eos:
        return rows
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


def _in_groups(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    interventions: Intervention | Sequence[Intervention],
    roles: Tensor | None,
    **options: Any,
) -> list[list[int]]:
    """The continuations of a model that reads padding: of rows of equal length at a time."""
    found: dict[int, list[int]] = {}
    for rows in equally_long(lengths_of(mask)):
        own, known = unpadded(ids[rows], mask[rows]), None if roles is None else unpadded(roles[rows], mask[rows])
        found |= zip(rows, generate_tokens(model, own, None, part_of(interventions, rows), roles=known, **options))
    return [found[row] for row in range(len(ids))]


@dataclass(frozen=True)
class Comparison:
    """The same prompt continued with and without interventions."""

    prompt: str
    unsteered: str
    steered: str


def compare(
    model: nn.Module,
    prompts: Prompts,
    interventions: Intervention | Sequence[Intervention],
    *,
    tokenizer: Any = None,
    **sampling: Any,
) -> list[Comparison]:
    """Each prompt continued without and with the interventions, drawn with the same random numbers."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    plain = generate(model, prompts, tokenizer=tokenizer, **sampling)
    steered = generate(model, prompts, interventions, tokenizer=tokenizer, **sampling)
    return [Comparison(*texts) for texts in zip(prompts, plain, steered)]


@dataclass
class KeptCache:
    """A model's cache of the first ``length`` tokens of one text, kept from one generation to the next."""

    cache: Any = None
    length: int = 0


@torch.no_grad()
def token_steps(
    model: nn.Module,
    ids: Int[Tensor, "batch length"],
    mask: Int[Tensor, "batch length"],
    settings: Sampling,
    ends: Sequence[int],
    kept: KeptCache | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """The tokens of each step of a generation, until all rows have ended or as many as the settings allow.

    ``kept`` holds a cache of the first tokens of ``ids`` (one row), which are then not computed again; it is brought up
    to date with every step.
    """
    root, device = underlying(model), device_of(model)
    check_tokens(model, ids[mask.bool()])
    check_length(model, int(mask.sum(dim=1).max()) + settings.max_new_tokens, "a prompt with its continuation")
    ids, mask = ids.to(device), mask.to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    eos = torch.tensor(ends if settings.stop_at_eos else (), dtype=torch.int64, device=device)
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=device)
    kept = kept if kept is not None and settings.use_cache else KeptCache()
    cache, fresh, use_cache = kept.cache, ids[:, kept.length :], settings.use_cache
    padded = not bool(mask.all())  # asked once: each answer from the device is waited for
    for _ in range(settings.max_new_tokens):
        # A token that was just written is no padding.
        logits, cache = forward(root, fresh, mask, cache, use_cache, last_only=True, padded=padded and cache is None)
        if padded and cache is not None and not _masks_padding(cache, mask):
            cache, use_cache = None, False
        kept.cache, kept.length = cache, 0 if cache is None else ids.shape[1]
        tokens = settings.draw(logits[:, -1], generator)
        if eos.numel():
            tokens = torch.where(done, eos[0], tokens)
            done |= torch.isin(tokens, eos)
        if bool(done.all()):
            return
        yield tokens
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        fresh = ids if cache is None else tokens[:, None]


def _masks_padding(cache: Any, mask: Tensor) -> bool:
    """Whether padding stays masked with this cache. transformers aligns the mask by the number of tokens that a cache
    says it holds, and that of MiniMax, whose first layer keeps a state and no tokens, says none."""
    try:
        return int(cache.get_seq_length()) == mask.shape[1]
    except (AttributeError, ValueError):  # a cache of states alone: there is no mask over its tokens
        return True


def forward(
    root: nn.Module,
    ids: Tensor,
    mask: Tensor,
    cache: Any = None,
    use_cache: bool = False,
    last_only: bool = False,
    padded: bool | None = None,
) -> tuple[Tensor, Any]:
    """Logits ``[batch, length, vocabulary]`` and the cache; ``mask`` covers cached tokens too, padding on the left.

    ``last_only`` spares the logits before the last position where the model can; ``padded`` says whether some of
    ``ids`` are padding, which is otherwise looked up.
    """
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    # The embedding looks padding up too, and may have no row for the token that the tokenizer pads with.
    ids = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, 0)
    options: dict[str, Any] = {"use_cache": use_cache}
    if cache is not None:
        options["past_key_values"] = cache
    if last_only and "logits_to_keep" in inspect.signature(root.forward).parameters:
        options["logits_to_keep"] = 1
    fresh = mask[:, -ids.shape[1] :]
    padded = not bool(fresh.all()) if padded is None else padded
    with padding_masked(root, fresh) if padded else nullcontext():
        output = root(input_ids=ids, attention_mask=mask, position_ids=positions, **options)
    if isinstance(output, Tensor):
        return output, None
    return output.logits, getattr(output, "past_key_values", None) if use_cache else None
