"""First-letter absorption: is a latent for "starts with B" silent on words that another latent has absorbed?

The definition is SAEBench's (Karvonen et al., 2025; after Chanin et al., 2024). Activations are those under the first
token of words in the cached text, labelled with the word's first letter; a logistic probe per letter is the ground
truth. It is checked first that the model's activations carry the letter; otherwise absorption cannot be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import f1_score
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.data.cache.reader import Split
from saelab.errors import UserError
from saelab.evaluation.tasks.probing import Standardised, logistic, top_columns
from saelab.sae import SAE

SPLIT_GAIN = 0.03  # a further latent is a split of the feature while it adds this much F1
FULL_COSINE, FULL_SHARE = 0.025, 0.4
PART_COSINE, N_ABSORBERS = 0.1, 3
SPELLS = 0.5  # mean test F1 of the letter probes below which the model is said not to spell


def words_by_letter(
    cache: ActivationCache,
    strings: Sequence[str],
    *,
    per_word: int = 5,
    max_rows: int = 8000,
    split: Split = "held_out",
) -> tuple[Float[Tensor, "n d_in"], np.ndarray]:
    """Activations of word-initial tokens (a space and at least two letters) and their first letters, lower case.

    At most ``per_word`` occurrences of a token, so that frequent words do not decide.
    """
    letters = {
        i: text[1].lower() for i, text in enumerate(strings) if text[:1] == " " and len(text) > 2 and text[1:].isascii()
        and text[1:].isalpha()
    }  # fmt: skip
    counts: dict[int, int] = {}
    rows, labels = [], []
    for tokens, own in cache.contexts(split):
        for token, row in zip(tokens.tolist(), own.tolist()):
            if row >= 0 and token in letters and counts.get(token, 0) < per_word:
                counts[token] = counts.get(token, 0) + 1
                rows.append(row)
                labels.append(letters[token])
        if len(rows) >= max_rows:
            break
    if not rows:
        raise UserError(f"no word starts in the {split} split of {cache.path}; harvest running text")
    return cache.read(rows).acts, np.array(labels)


@torch.no_grad()
def absorption(
    sae: SAE, acts: Float[Tensor, "n d_in"], letters: np.ndarray, min_letter: int = 40, seed: int = 0
) -> dict[str, Any]:
    """Mean absorption fraction and rate of full absorption over letters; UserError where the model does not spell.

    Signs: a signed latent's contribution ``z_j cos(probe, d_j)`` carries its sign, so a negative value along a
    direction opposed to the probe counts as a positive contribution, as it should.
    """
    rng = np.random.default_rng(seed)
    is_test = rng.permutation(letters.size) < letters.size // 4
    x = acts.numpy()
    z = sae.encode(acts.to(sae.device)).to("cpu").dense().numpy()
    D = sae.W_dec.detach().cpu().numpy()
    chosen = [c for c in sorted(set(letters)) if (letters == c).sum() >= min_letter]
    if not chosen:
        raise UserError(f"no letter starts {min_letter} words here; use more text")
    probes = {c: Standardised(x[~is_test], letters[~is_test] == c) for c in chosen}
    f1 = {c: f1_score(letters[is_test] == c, probe.predict(x[is_test])) for c, probe in probes.items()}
    spelling = float(np.mean(list(f1.values())))
    if spelling < SPELLS:
        raise UserError(
            f"letter probes reach F1 {spelling:.2f} on this model's activations, below {SPELLS}: it does not spell "
            "here, so absorption cannot be measured; use a larger model"
        )
    per_letter = {c: _letter(c, probes[c], x, z, D, letters, ~is_test) for c in chosen}
    per_letter = {c: r for c, r in per_letter.items() if r is not None}
    return {
        "absorption_fraction": float(np.mean([r["fraction"] for r in per_letter.values()])),
        "full_absorption_rate": float(np.mean([r["full"] for r in per_letter.values()])),
        "split_latents": float(np.mean([r["n_split"] for r in per_letter.values()])),
        "probe_f1": spelling,
        "letters": len(per_letter),
        "words": int(letters.size),
    }


def _letter(
    letter: str,
    probe: Standardised,
    x: np.ndarray,
    z: np.ndarray,
    D: np.ndarray,
    letters: np.ndarray,
    train: np.ndarray,
) -> dict[str, float] | None:
    y = letters == letter
    main = split_latents(z[train], y[train])
    direction = probe.coef / np.linalg.norm(probe.coef)
    cosines = D @ direction / np.maximum(np.linalg.norm(D, axis=1), 1e-12)
    hits = np.flatnonzero(y & probe.predict(x))
    if not hits.size:
        return None
    fractions, full = absorbed(x[hits], z[hits], cosines, direction, main)
    return {"fraction": float(fractions.mean()), "full": float(full.mean()), "n_split": float(len(main))}


def split_latents(z: np.ndarray, y: np.ndarray, k_max: int = 10) -> np.ndarray:
    """The latents a k-sparse probe needs: k grows while its F1 rises by more than ``SPLIT_GAIN``."""
    order, best, chosen = top_columns(z, y, k_max), -np.inf, 0
    for k in range(1, k_max + 1):
        columns = order[:k]
        f1 = f1_score(y, logistic(z[:, columns], y).predict(z[:, columns]))
        if f1 <= best + SPLIT_GAIN:
            break
        best, chosen = f1, k
    return order[:chosen]


def absorbed(
    x: np.ndarray, z: np.ndarray, cosines: np.ndarray, direction: np.ndarray, main: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Absorption fraction of each word, and whether it is fully absorbed.

    ``projection_j = z_j cos_j``. Full: all main latents silent, and the latent that projects most has a cosine of at
    least 0.025 and makes 0.4 of the activation's projection on the probe. Fraction: of up to three other latents with
    cosine at least 0.1 and a positive projection that together make 0.4 of it, else 0.
    """
    projection = z * cosines
    main_sum = projection[:, main].sum(1)
    others = projection.copy()
    others[:, main] = -np.inf
    top = others.argmax(1)
    whole = x @ direction
    rows = np.arange(len(x))
    silent = (np.abs(z[:, main]) < 1e-8).all(1)
    full = silent & (np.abs(cosines[top]) >= FULL_COSINE) & (others[rows, top] >= FULL_SHARE * whole) & (whole > 0)
    eligible = np.where((np.abs(cosines) >= PART_COSINE) & (others > 0), others, 0.0)
    part = np.sort(eligible, axis=1)[:, -N_ABSORBERS:].sum(1)
    part = np.where((part >= FULL_SHARE * whole) & (whole > 0), part, 0.0)
    missing = np.minimum(part, whole - main_sum)
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(main_sum <= 0, 1.0, missing / (missing + main_sum))
    return np.where(part > 0, np.clip(fraction, 0, 1), 0.0), full
