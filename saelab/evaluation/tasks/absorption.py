"""First-letter absorption: is a latent for "starts with B" silent on words that another latent has absorbed?

The definition and its rules are SAEBench's (Karvonen et al., 2025; after Chanin et al., 2024). Activations are those
under the first token of words in the cached text, labelled with the word's first letter (in SAEBench a prompt asks for
it); a logistic probe per letter is the ground truth. A letter's own latents are those that a probe with an L1
penalty weighs highest, as many as a balanced probe on them needs. Words are divided, all occurrences of a word on one
side, since a probe that has seen a word need not spell it: probes see one part, and the score is of the occurrences in
the other that the letter's probe gets right. Letters whose probe is worse than F1 0.6 on them are
left out, and with fewer than 20 left the model does not spell, so that absorption cannot be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.data.cache import ActivationCache
from saelab.data.cache.reader import Split
from saelab.errors import UserError
from saelab.evaluation.tasks.probing import Standardised, logistic
from saelab.sae import SAE

SPLIT_GAIN = 0.03  # a further latent is a split of the feature while it adds this much F1
FULL_COSINE, FULL_SHARE = 0.025, 0.4
PART_COSINE, N_ABSORBERS = 0.1, 3
SPELLS = 0.6  # test F1 that a letter's probe must exceed for the letter to count
LETTERS = 20  # that must count
L1_PENALTY, L1_EPOCHS, L1_BATCH, L1_RATES = 0.01, 50, 4096, (1e-2, 1e-5)  # of the probe that finds a letter's latents


def first_words(
    cache: ActivationCache,
    strings: Sequence[str],
    *,
    per_word: int = 5,
    max_rows: int = 8000,
    split: Split = "held_out",
) -> tuple[Float[Tensor, "n d_in"], np.ndarray]:
    """Activations of word-initial tokens (a space and at least two letters) and those letters, in lower case.

    At most ``per_word`` occurrences of each, so that frequent words do not decide.
    """
    starts = {i: text[1:].lower() for i, text in enumerate(strings) if text[:1] == " " and len(text) > 2}
    words = {i: word for i, word in starts.items() if word.isascii() and word.isalpha()}
    counts: dict[str, int] = {}
    rows, labels = [], []
    for tokens, own in cache.contexts(split):
        for token, row in zip(tokens.tolist(), own.tolist()):
            word = words.get(token, "")
            if row >= 0 and word and counts.get(word, 0) < per_word:
                counts[word] = counts.get(word, 0) + 1
                rows.append(row)
                labels.append(word)
        if len(rows) >= max_rows:
            break
    if not rows:
        raise UserError(f"no word starts in the {split} split of {cache.path}; harvest running text")
    return cache.read(rows).acts, np.array(labels)


def absorption(
    sae: SAE,
    acts: Float[Tensor, "n d_in"],
    words: np.ndarray,
    min_letter: int = 20,
    seed: int = 0,
    min_letters: int = LETTERS,
) -> dict[str, Any]:
    """Mean absorption fraction and rate of full absorption over letters; UserError where the model does not spell.

    ``words [n]`` is the word under each activation, in lower case; one in four words is tested on. Letters of fewer
    than ``min_letter`` occurrences are left out. A signed latent counts as two poles, ``relu(z)`` along ``d`` and
    ``relu(-z)`` along ``-d``, as in SAEBench, which knows no signs.
    """
    from sklearn.metrics import f1_score

    letters = words.astype("U1")
    known, which = np.unique(words, return_inverse=True)
    test = (np.random.default_rng(seed).permutation(known.size) < known.size // 4)[which]
    x = acts.numpy()
    with torch.no_grad():
        z = sae.features(sae.encode(acts.to(sae.device))).to("cpu").dense().numpy()
        D = sae.directions.detach().cpu().numpy()
    if (z < 0).any():
        z, D = np.concatenate([z.clip(0), (-z).clip(0)], axis=1), np.concatenate([D, -D])
    chosen = [c for c in sorted(set(letters)) if (letters == c).sum() >= min_letter]
    chosen = [c for c in chosen if (letters[test] == c).any() and (letters[~test] == c).any()]
    if not chosen:
        raise UserError(f"no letter starts {min_letter} occurrences of words here; use more text")
    probes = {c: Standardised(x[~test], letters[~test] == c) for c in chosen}
    f1 = {c: float(f1_score(letters[test] == c, probe.predict(x[test]))) for c, probe in probes.items()}
    spelt = [c for c in chosen if f1[c] > SPELLS]
    if len(spelt) < min_letters:
        raise UserError(
            f"the probes of {len(spelt)} letters exceed F1 {SPELLS} on this model's activations, and absorption needs "
            f"{min_letters}: it does not spell here; use a larger model or more text, or lower --min-letters"
        )
    targets = np.stack([letters == c for c in chosen], axis=1)
    weights = l1_probe(z[~test], targets[~test], seed)
    per_letter = {}
    for c in spelt:
        main = split_latents(z, letters == c, ~test, weights[chosen.index(c)])
        direction = probes[c].coef / np.linalg.norm(probes[c].coef)
        cosines = D @ direction / np.maximum(np.linalg.norm(D, axis=1), 1e-12)
        hits = np.flatnonzero(test & (letters == c) & probes[c].predict(x))
        fractions, full = absorbed(x[hits], z[hits], cosines, direction, main)
        scored = np.unique(which[hits]).size
        per_letter[c] = {"fraction": fractions.mean(), "full": full.mean(), "n_split": len(main), "words": scored}
    return _summary(per_letter, f1, known.size)


def _summary(per_letter: dict[str, dict[str, Any]], f1: dict[str, float], words: int) -> dict[str, Any]:
    rows = per_letter.values()
    return {
        "absorption_fraction": float(np.mean([r["fraction"] for r in rows])),
        "full_absorption_rate": float(np.mean([r["full"] for r in rows])),
        "split_latents": float(np.mean([r["n_split"] for r in rows])),
        "probe_f1": float(np.mean([f1[c] for c in per_letter])),
        "letters": len(per_letter),
        "scored_words": int(sum(r["words"] for r in rows)),
        "words": int(words),
    }


def l1_probe(z: Float[np.ndarray, "n d_sae"], y: np.ndarray, seed: int = 0) -> Float[np.ndarray, "letters d_sae"]:
    """Weights of one linear probe per column of ``y [n, letters]`` on all latents, sparse by an L1 penalty.

    Adam on the logistic loss with both sides counting alike plus ``0.01 mean_letters sum_j |w_j|``, 50 passes in
    batches of 4096, the rate falling from 1e-2 to 1e-5: the settings of SAEBench. The weights begin at zero and not at
    random, because few words give few steps.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, targets = torch.from_numpy(z).float(), torch.from_numpy(y).float()
    positive = targets.sum(0)
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=(len(targets) - positive) / positive)
    weight, bias = (torch.zeros(y.shape[1], *shape, requires_grad=True) for shape in ((z.shape[1],), ()))
    steps = L1_EPOCHS * -(-len(rows) // L1_BATCH)
    optimizer = torch.optim.Adam([weight, bias], lr=L1_RATES[0], weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (L1_RATES[1] / L1_RATES[0]) ** (1 / steps))
    with torch.enable_grad():
        for _ in range(L1_EPOCHS):
            for part in torch.randperm(len(rows), generator=generator).split(L1_BATCH):
                optimizer.zero_grad()
                penalty = L1_PENALTY * weight.abs().sum(1).mean()
                (loss(rows[part] @ weight.T + bias, targets[part]) + penalty).backward()
                optimizer.step()
                schedule.step()
    return weight.detach().numpy()


def split_latents(
    z: np.ndarray, y: np.ndarray, train: np.ndarray, weights: Float[np.ndarray, " d_sae"], k_max: int = 10
) -> np.ndarray:
    """The latents a letter is split over: the k with the largest weights, positive ones first, where k grows while a
    balanced probe on them, fitted to ``train``, gains more than ``SPLIT_GAIN`` of F1 on the other words."""
    from sklearn.metrics import f1_score

    order, best, chosen = np.argsort(-weights, kind="stable")[:k_max], -np.inf, 0
    for k in range(1, len(order) + 1):
        columns = order[:k]
        probe = logistic(z[train][:, columns], y[train], balanced=True)
        f1 = f1_score(y[~train], probe.predict(z[~train][:, columns]))
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
