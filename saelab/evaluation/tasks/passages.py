"""Passages with labels for probing tasks: from any labelled ``.jsonl``, or derived from the text behind a cache."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.data.cache import ActivationCache
from saelab.data.cache.reader import Split
from saelab.data.text.files import json_lines
from saelab.errors import UserError
from saelab.lm.offload import device_of
from saelab.lm.sites import Site
from saelab.lm.structure import Reached
from saelab.sae import SAE

YEAR = re.compile(r"\b1[0-9]{3}\b|\b20[0-2][0-9]\b")


@dataclass(frozen=True)
class Passages:
    """Activations of labelled passages: token ``i`` belongs to passage ``owner[i]``; a label per passage and column."""

    acts: Float[Tensor, "tokens d_in"]
    owner: Int[Tensor, " tokens"]
    labels: Mapping[str, Sequence[str]]
    source: str

    @property
    def n(self) -> int:
        return len(next(iter(self.labels.values())))

    def column(self, name: str) -> np.ndarray:
        """The labels of one column; at least two classes, or an error that says what to do."""
        if name not in self.labels:
            raise UserError(f"{self.source} has no label {name!r}; it has {', '.join(self.labels)}")
        values = np.asarray(self.labels[name], dtype=object)
        if len(set(values)) < 2:
            raise UserError(
                f"label {name!r} of {self.source} has one class only ({values[0]!r}); add examples of another"
            )
        return values


@dataclass(frozen=True)
class Pooled:
    """Passages averaged over their tokens.

    Averages commute with decoding, so zeroing latents while the SAE's error stays is exact here: it takes
    ``z[:, j] * directions[j]`` from ``x``. A signed latent appears as two poles, ``relu(z)`` along ``d`` and
    ``relu(-z)`` along ``-d``, because a pole is what has a meaning.

    Attributes:
        x: mean activations ``[n, d_in]``.
        z: mean values of the poles ``[n, n_poles]``.
        directions: ``[n_poles, d_in]``.
        latents: mean values of the latents with their sign ``[n, d_sae]``.
    """

    x: np.ndarray
    z: np.ndarray
    directions: np.ndarray
    latents: np.ndarray


@torch.no_grad()
def pool(sae: SAE, passages: Passages, batch_size: int = 4096) -> Pooled:
    """Encode every token and average within passages."""
    n, d_sae = passages.n, sae.n_features
    x = torch.zeros(n, sae.d_in).index_add_(0, passages.owner, passages.acts)
    positive, negative = torch.zeros(n * d_sae), torch.zeros(n * d_sae)
    for start in range(0, passages.acts.shape[0], batch_size):
        part = slice(start, start + batch_size)
        code = sae.features(sae.encode(passages.acts[part].to(sae.device))).to("cpu")
        at = passages.owner[part][code.rows()] * d_sae + code.indices
        positive.index_add_(0, at, code.values.clamp_min(0))
        negative.index_add_(0, at, code.values.clamp_max(0))
    size = torch.bincount(passages.owner, minlength=n).clamp_min(1)[:, None]
    up, down = positive.view(n, d_sae) / size, negative.view(n, d_sae) / size
    D = sae.directions.detach().cpu()
    z, directions = (torch.cat([up, -down], 1), torch.cat([D, -D])) if bool((down != 0).any()) else (up, D)
    return Pooled((x / size).numpy(), z.numpy(), directions.numpy(), (up + down).numpy())


def from_cache(
    cache: ActivationCache,
    decode: Callable[[list[int]], str] | None = None,
    *,
    passage_tokens: int = 32,
    max_passages: int = 2000,
    split: Split = "held_out",
) -> Passages:
    """Built-in labelled sets: runs of ``passage_tokens`` rows that lie in one document.

    ``article`` is the document; with ``decode`` (token ids to text) ``year`` says whether a year is written in the
    passage. Passages are spread evenly over the split.
    """
    found: list[tuple[Tensor, int, str]] = []
    for tokens, rows in cache.contexts(split):
        stored = rows >= 0
        own, text = rows[stored], tokens[stored]
        for start in range(0, own.numel() - passage_tokens + 1, passage_tokens):
            part = own[start : start + passage_tokens]
            document = cache.document(int(part[0]))
            if document == cache.document(int(part[-1])):
                words = decode(text[start : start + passage_tokens].tolist()) if decode else ""
                found.append((part, document, words))
    if not found:
        raise UserError(f"no run of {passage_tokens} rows of {cache.path} lies in one document; shorten the passages")
    chosen = np.unique(np.linspace(0, len(found) - 1, min(max_passages, len(found))).round().astype(int))
    found = [found[i] for i in chosen]
    labels = {"article": [str(document) for _, document, _ in found]}
    if decode:
        labels["year"] = ["yes" if YEAR.search(words) else "no" for *_, words in found]
    acts = cache.read(torch.cat([rows for rows, *_ in found])).acts
    owner = torch.arange(len(found)).repeat_interleave(passage_tokens)
    return Passages(acts, owner, labels, f"the text of {cache.path}")


def read_jsonl(path: Path | str) -> tuple[list[str], dict[str, list[str]]]:
    """Texts and label columns of a ``.jsonl`` whose lines have ``text`` and at least one more key."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a .jsonl with the keys text and label")
    texts, rows = [], []
    for where, row in json_lines(path):
        if "text" not in row or len(row) < 2:
            raise UserError(f"{where} needs the key text and at least one label; add them or remove the line")
        if not str(row["text"]).strip():
            raise UserError(f"{where} has an empty document; remove the line")
        texts.append(str(row.pop("text")))
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no examples; add lines with the keys text and label")
    names = [name for name in rows[0] if all(name in row for row in rows)]
    if not names:
        raise UserError(f"no label of {path} is present on every line; give each line the same keys")
    return texts, {name: [str(row[name]) for row in rows] for name in names}


@torch.no_grad()
def from_texts(
    model: nn.Module,
    site: Site,
    encode: Callable[[str], list[int]],
    texts: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    *,
    source: str,
    max_tokens: int = 128,
    skip_first: int = 1,
) -> Passages:
    """Run each text through a plain Hugging Face ``model`` to ``site``, and keep the activations after the first
    ``skip_first`` positions, on the CPU.

    ``encode`` gives token ids, including a leading BOS token. Raises UserError for a text with no token left.
    """
    acts, owner = [], []
    for i, text in enumerate(texts):
        ids = torch.tensor(encode(text)[:max_tokens], dtype=torch.int64)
        if ids.numel() <= skip_first:
            raise UserError(f"example {i + 1} of {source} has {ids.numel()} tokens, too few to pool; remove it")

        def keep(hidden: Tensor) -> None:
            acts.append(hidden[0, skip_first:].float().cpu())
            raise Reached

        with site.register(model, keep):
            try:
                model(input_ids=ids[None].to(device_of(model)), use_cache=False)
            except Reached:
                owner.append(torch.full((acts[-1].shape[0],), i))
    return Passages(torch.cat(acts), torch.cat(owner), labels, source)


def frequent(values: np.ndarray, min_count: int, max_classes: int = 8) -> list[str]:
    """The most frequent classes with at least ``min_count`` passages each; at least two, or an error."""
    classes = [name for name, count in Counter(values).most_common(max_classes) if count >= min_count]
    if len(classes) < 2:
        raise UserError(f"fewer than two classes have {min_count} passages; add text, or shorten the passages")
    return classes
