"""Directions from two sets of texts: difference of means, logistic probe, main axis of pairs.

They are the baselines every latent is measured against (Wu et al., 2025, arXiv 2501.17148: simple supervised
directions often steer better than latents).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.lm import model_name
from saelab.lm.offload import device_of
from saelab.lm.padding import equally_long, masks_padding
from saelab.lm.sites import check_replaceable, locate, underlying
from saelab.lm.tokens import token_ids, tokenize, tokenizer_of
from saelab.steering.attachment import attach
from saelab.steering.generation import forward
from saelab.steering.vectors import SteeringVector


def text_activations(
    model: nn.Module,
    hook_name: str,
    texts: Sequence[str],
    tokens: str = "mean",
    tokenizer: Any = None,
    batch_size: int = 16,
) -> Float[Tensor, "texts d_in"]:
    """One row of activations per text: the mean over its tokens, or its ``"last"`` token.

    The first token, an attention sink of huge norm, is left out unless the text has no other.
    """
    return read_texts(model, hook_name, texts, tokens, tokenizer, batch_size)[0]


@torch.no_grad()
def read_texts(
    model: nn.Module,
    hook_name: str,
    texts: Sequence[str],
    tokens: str = "mean",
    tokenizer: Any = None,
    batch_size: int = 16,
) -> tuple[Float[Tensor, "texts d_in"], Float[Tensor, " tokens"]]:
    """What :func:`text_activations` gives, and the norm of the activations on every token that is not left out.

    The norms are those of single tokens, as in a cache: the mean over a text is shorter than what it is the mean of.
    """
    if tokens not in {"mean", "last"}:
        raise UserError(f"tokens={tokens!r} is neither mean nor last")
    if isinstance(texts, str) or not texts:
        raise UserError("give a list of at least one text")
    tokenizer = tokenizer_of(model, tokenizer)
    root, device, site = underlying(model), device_of(model), check_replaceable(locate(model, hook_name))
    found: list[tuple[int, Tensor, Tensor]] = []  # the place of a text, its row and its norms
    for batch in _batches(model, tokenizer, texts, batch_size):
        ids, mask = (t.to(device) for t in tokenize(tokenizer, [texts[place] for place in batch]))
        seen: list[Tensor] = []
        with attach(model, []), site.register(model, lambda x, seen=seen: seen.append(x.to(torch.float32, copy=True))):
            forward(root, ids, mask, last_only=True)
        kept = mask.bool() & ((mask.cumsum(dim=1) > 1) | (mask.sum(dim=1, keepdim=True) == 1))
        kept = kept.to(seen[0].device)  # the blocks of a model may be on several devices
        last, mean = seen[0][:, -1], (seen[0] * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
        norms = seen[0][kept].norm(dim=1).cpu().split(kept.sum(dim=1).tolist())
        found += zip(batch, (last if tokens == "last" else mean).cpu(), norms)
    found.sort(key=lambda one: one[0])
    return torch.stack([row for _, row, _ in found]), torch.cat([norms for *_, norms in found])


def _batches(model: nn.Module, tokenizer: Any, texts: Sequence[str], size: int) -> Iterator[Sequence[int]]:
    """The places of the texts of each batch: in order, or of equally many tokens where the model reads padding."""
    if masks_padding(model):
        return (range(start, min(start + size, len(texts))) for start in range(0, len(texts), size))
    return equally_long([len(token_ids(tokenizer, text)) for text in texts], size)


def rms(norms: Float[Tensor, " tokens"]) -> float:
    """The root mean square of the norms."""
    return float(norms.square().mean().sqrt())


def difference_of_means(
    model: nn.Module, hook_name: str, positive: Sequence[str], negative: Sequence[str], **options: Any
) -> SteeringVector:
    """Mean over ``positive`` texts minus mean over ``negative`` texts; its norm is the distance of the two means."""
    pos, neg, known = _both(model, hook_name, positive, negative, options)
    origin = _origin("difference_of_means", positive, negative, options)
    return SteeringVector.from_tensor(pos.mean(0) - neg.mean(0), hook_name, origin=origin, **known)


def probe(
    model: nn.Module,
    hook_name: str,
    positive: Sequence[str],
    negative: Sequence[str],
    penalty: float = 1.0,
    **options: Any,
) -> SteeringVector:
    """The normal of a logistic regression between the two sets, pointing to ``positive``.

    Its norm is the distance of the class means along it. ``origin["accuracy"]`` is cross-validated (5 folds, fewer
    when a class is smaller; absent when one has a single text). ``penalty`` is the L2 weight on activations scaled
    to unit mean square.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    pos, neg, known = _both(model, hook_name, positive, negative, options)
    x = torch.cat([pos, neg]).double()
    x = ((x - x.mean(0)) / x.std()).numpy()
    y = [1] * len(pos) + [0] * len(neg)
    model_of_y = LogisticRegression(C=1 / penalty, max_iter=1000)
    origin = _origin("probe", positive, negative, options)
    folds = min(5, len(pos), len(neg))
    if folds > 1:
        origin["accuracy"] = float(cross_val_score(model_of_y, x, y, cv=folds).mean())
    direction = torch.from_numpy(model_of_y.fit(x, y).coef_[0]).float()
    direction /= direction.norm()
    distance = ((pos.mean(0) - neg.mean(0)) @ direction).abs()
    return SteeringVector.from_tensor(direction * distance, hook_name, origin=origin, **known)


def pca(
    model: nn.Module, hook_name: str, positive: Sequence[str], negative: Sequence[str], **options: Any
) -> SteeringVector:
    """The axis along which the differences ``positive[i] - negative[i]`` are largest, pointing to ``positive``.

    The differences are not centred: what all pairs share is the signal. Its norm is their root-mean-square extent
    along the axis; ``origin["explained"]`` is the share of their squared length.
    """
    if len(positive) != len(negative):
        raise UserError(f"pca needs pairs, not {len(positive)} positive and {len(negative)} negative texts")
    pos, neg, known = _both(model, hook_name, positive, negative, options)
    differences = (pos - neg).double()
    _, sizes, axes = torch.linalg.svd(differences, full_matrices=False)
    along = differences @ axes[0]
    axis = axes[0] * torch.sign(along.mean() + torch.finfo(torch.double).tiny)
    origin = _origin("pca", positive, negative, options)
    origin["explained"] = float(sizes[0] ** 2 / (sizes**2).sum())
    return SteeringVector.from_tensor(axis * along.square().mean().sqrt(), hook_name, origin=origin, **known)


def random_direction(like: SteeringVector, seed: int) -> SteeringVector:
    """A direction drawn uniformly, with the norm and the units of another vector: the control of an experiment."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(like.d_in, generator=generator)
    return SteeringVector.from_tensor(
        direction / direction.norm() * like.norm,
        like.hook_name,
        model=like.model,
        max_activation=like.max_activation,
        rms_norm=like.rms_norm,
        origin={"kind": "random", "seed": seed},
    )


def _both(
    model: nn.Module, hook_name: str, positive: Sequence[str], negative: Sequence[str], options: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The rows of either side, and what a vector made of them knows: its model, and the norm of the activations."""
    (pos, some), (neg, more) = (read_texts(model, hook_name, texts, **options) for texts in (positive, negative))
    return pos, neg, {"model": model_name(model)[0] or None, "rms_norm": rms(torch.cat([some, more]))}


def _origin(kind: str, positive: Sequence[str], negative: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    texts = json.dumps([list(positive), list(negative)]).encode()
    return {
        "kind": kind,
        "positive": len(positive),
        "negative": len(negative),
        "tokens": options.get("tokens", "mean"),
        "texts_sha256": hashlib.sha256(texts).hexdigest(),
    }
