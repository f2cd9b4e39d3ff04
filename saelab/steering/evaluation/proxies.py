"""Offline scores of an answer, where there is no judge. Each is a stated stand-in, from 0 to 2, for a judge's rating.

*concept*: twice the probability that a classifier gives the concept. It is a logistic regression on the mean
activations that a text alone has behind the unsteered model's last block, trained on contrast texts that made no
direction; how well it ranks texts that it was not trained on (AUC) stands beside it. *instruction*: twice the cosine,
not below 0, between the mean activations of the answer and those of the unsteered answer to the same instruction,
behind the instruction and at two thirds of the depth, both minus the mean over all unsteered answers: does it stay on
the topic that was asked for. *fluency*: ``2 exp(-max(0, s)) (1 - r)`` with ``s``, the surprise, how many nats per
token the unsteered model, given the plain instruction, finds the answer less likely than its own answers on average,
and ``r`` the share of repeated trigrams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm.offload import device_of
from saelab.lm.sites import blocks, locate, underlying
from saelab.lm.tokens import padded, token_ids
from saelab.steering.attachment import attach
from saelab.steering.evaluation.answers import prompt_ids
from saelab.steering.evaluation.concepts import Concept
from saelab.steering.generation import forward
from saelab.steering.measure.effects import repetition

Array = NDArray[np.float64]
RATING = 2.0  # the best score
ROWS = 12  # texts read at once: their logits take the memory


@dataclass(frozen=True, eq=False)
class Read:
    """What the unsteered model makes of texts: mean activations ``[texts, width]`` and nats per token ``[texts]``."""

    activations: Array
    nats: Array


class Reader:
    """The unsteered model as a reader of answers to instructions."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        depth = len(blocks(model)[1])
        self.hook_name = f"blocks.{min(2 * depth // 3, depth - 1)}.hook_resid_post"
        self.site, self.last = locate(model, self.hook_name), locate(model, f"blocks.{depth - 1}.hook_resid_post")

    @torch.no_grad()
    def alone(self, texts: Sequence[Sequence[int]]) -> Array:
        """Mean activations ``[texts, width]`` behind the last block of texts (token ids) without an instruction; zeros
        for an empty one. A text's first token, an attention sink, is left out where there is no BOS token to be it."""
        start = token_ids(self.tokenizer, "")
        found = []
        for begin in range(0, len(texts), ROWS):
            some = [list(text) for text in texts[begin : begin + ROWS]]
            ids, mask = (t.to(device_of(self.model)) for t in padded([[*start, *(text or [0])] for text in some]))
            seen: list[Tensor] = []
            with attach(self.model, []), self.last.register(self.model, lambda x, seen=seen: seen.append(x.cpu())):
                forward(underlying(self.model), ids, mask, last_only=True)
            for row, text in zip(seen[0], some):
                n = len(text) if start or len(text) < 2 else len(text) - 1
                found.append(row[-n:].double().mean(0).numpy() if n else np.zeros(row.shape[-1]))
        return np.array(found)

    @torch.no_grad()
    def read(self, instructions: Sequence[str], answers: Sequence[Sequence[int]]) -> Read:
        """Read each answer (token ids) behind its instruction; an empty answer gives zeros and no surprise (NaN)."""
        prompts = [prompt_ids(self.tokenizer, text) for text in instructions]
        parts = [self._some(prompts[i : i + ROWS], answers[i : i + ROWS]) for i in range(0, len(answers), ROWS)]
        return Read(*(np.concatenate(column) for column in zip(*parts)))

    def _some(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[Array, Array]:
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers)]
        ids, mask = (t.to(device_of(self.model)) for t in padded(rows))
        seen: list[Tensor] = []
        with attach(self.model, []), self.site.register(self.model, lambda x: seen.append(x.float().cpu())):
            logits = forward(underlying(self.model), ids, mask)[0]
        acts, nats = [], []
        for row, answer in enumerate(answers):
            n = len(answer)
            if n == 0:
                acts.append(np.zeros(seen[0].shape[-1]))
                nats.append(math.nan)
                continue
            acts.append(seen[0][row, -n:].double().mean(0).numpy())
            before = logits[row, -n - 1 : -1].float()
            chosen = before.gather(1, ids[row, -n:, None])[:, 0]
            nats.append(float((before.logsumexp(1) - chosen).double().mean()))
        return np.array(acts), np.array(nats)


@dataclass(frozen=True)
class Accuracy:
    """How well a classifier tells texts that it was not trained on: of five folds, or fewer for fewer texts."""

    auc: float  # the probability that a text about the concept is ranked above another one
    balanced: float  # mean of both recalls; one threshold was fitted to the same folds
    positive: int
    negative: int


@dataclass(frozen=True, eq=False)
class Classifier:
    """Tells answers about a concept from others."""

    model: Any
    calibration: Any
    centre: Array
    scale: float
    accuracy: Accuracy

    def scores(self, activations: Array) -> Array:
        """The probability of the concept for each text."""
        decision = self.model.decision_function((activations - self.centre) / self.scale)
        return self.calibration.predict_proba(decision[:, None])[:, 1]


def train_classifier(positive: Array, negative: Array) -> Classifier:
    """A balanced logistic regression, whose probabilities are calibrated on texts that were held out (Platt, 1999).

    With a handful of positive texts the uncalibrated probability of a new one is far too low.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if min(len(positive), len(negative)) < 2:
        raise UserError("a classifier needs two texts of each sort; give the concept more contrast texts")
    x = np.concatenate([positive, negative])
    y = np.array([1] * len(positive) + [0] * len(negative))
    centre = x.mean(0)
    scale = float(np.sqrt(np.square(x - centre).sum(1).mean())) or 1.0
    x = (x - centre) / scale
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(min(5, len(positive), len(negative)), shuffle=True, random_state=0)
    held = np.asarray(cross_val_predict(model, x, y, cv=folds, method="decision_function"))
    calibration = LogisticRegression(class_weight="balanced").fit(held[:, None], y)
    told = calibration.predict(held[:, None])
    sizes = len(positive), len(negative)
    found = Accuracy(float(roc_auc_score(y, held)), float(balanced_accuracy_score(y, told)), *sizes)
    return Classifier(model.fit(x, y), calibration, centre, scale, found)


def contrast_reading(reader: Reader, texts: Sequence[str]) -> Array:
    """The activations of contrast texts."""
    return reader.alone([token_ids(reader.tokenizer, text, bos=False) for text in texts])


def classifier_for(concept: Concept, own: dict[str, tuple[Array, Array]]) -> Classifier:
    """The classifier of one concept among the readings of all concepts' texts: ``{name: (positive, negative)}``.

    Its negatives are the concept's own, and what the other concepts' positive texts are about.
    """
    others = [positive for name, (positive, _) in own.items() if name != concept.name]
    positive, negative = own[concept.name]
    return train_classifier(positive, np.concatenate([negative, *others]))


def topic_similarity(answers: Array, unsteered: Array, mean: Array) -> Array:
    """Cosine of each answer with the unsteered answer to the same instruction, both minus ``mean``."""
    a, b = answers - mean, unsteered - mean
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)


def distinct(tokens: Sequence[int], n: int = 2) -> float:
    """Share of a text's ``n``-grams that are different ones; 1 for a text too short to have any."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def fluency(surprise: float, tokens: Sequence[int]) -> float:
    """The fluency proxy, 0 to 2; an empty answer (surprise NaN) has none."""
    if math.isnan(surprise):
        return 0.0
    return RATING * math.exp(-max(0.0, surprise)) * (1 - repetition(tokens))


def harmonic_mean(*scores: float) -> float:
    """Of scores from 0 on; 0 where one of them is."""
    return len(scores) / sum(1 / score for score in scores) if all(score > 0 for score in scores) else 0.0
