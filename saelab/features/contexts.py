"""Examples of an index with their whole contexts, read again from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.features.schema import Example
from saelab.sae import SAE


@torch.no_grad()
def whole_contexts(cache: ActivationCache, sae: SAE, examples: Sequence[Example]) -> list[Example]:
    """The examples, each with all tokens of its context and the latent's activation on them, in the order given.

    ``cache`` is the one that the index was built on, ``sae`` the indexed SAE. Tokens whose activations the cache does
    not hold (skipped positions) have 0. Raises UserError for a row that the cache does not have.
    """
    size, found = max(cache.manifest.context_length, 1), {}
    wanted = {example.row for example in examples}
    base = 0
    with sae.evaluating():
        for text, _, slots in cache.shard_texts():
            for row in sorted(wanted):
                if not base <= row < base + len(slots):
                    continue
                place = int(slots[row - base])
                start = place - place % size
                tokens = text[start : start + size]
                first, last = torch.searchsorted(slots, torch.tensor([start, start + len(tokens)])).tolist()
                code = sae.encode(cache.read(torch.arange(base + first, base + last)).acts.to(sae.device))
                found[row] = tokens, (slots[first:last] - start).tolist(), code.detach().to("cpu"), place - start
            base += len(slots)
    if missing := wanted - found.keys():
        raise UserError(f"{cache.path} has no row {min(missing)}; it is not the cache that the index was built on")
    return [_whole(cache, example, *found[example.row]) for example in examples]


def _whole(cache: ActivationCache, example: Example, tokens, places, code, focus: int) -> Example:
    values = [0.0] * len(tokens)
    hit = code.indices == example.latent
    for row, value in zip(code.rows()[hit].tolist(), code.values[hit].tolist()):
        values[places[row]] = float(value)
    strings = cache.token_strings(tokens)
    return replace(example, tokens=tokens.tolist(), strings=strings, activations=values, focus=focus)


def different_documents(examples: Sequence[Example]) -> list[Example]:
    """The same examples, the first of each document before the second of any."""
    seen: dict[int, int] = {}
    turn = []
    for example in examples:
        turn.append(seen.get(example.document, 0))
        seen[example.document] = turn[-1] + 1
    return [example for _, example in sorted(zip(turn, examples), key=lambda pair: pair[0])]
