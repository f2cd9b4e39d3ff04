"""The effect of every latent, error term and input on the target: activation x gradient, or integrated gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.attribution.passes import Pass, Passes, Reading, gradients
from saelab.attribution.places import Place
from saelab.attribution.target import Target
from saelab.lm.gradients import gradient_of, gradients_of
from saelab.lm.unwrapped import frozen as without_gradients
from saelab.sparse import SparseCode


@dataclass
class PlaceEffects:
    """What the latents and the error terms of one place do to the target, in units of the target.

    ``total`` counts all paths, ``direct`` those that avoid the other places. Entries are those of ``code``; bookkeeping
    latents of SAEs that read normalised activations have none, they count as ``rest`` with the offset.
    """

    place: Place
    skip: int
    code: SparseCode  # of the encoded tokens of the text
    total: Float[Tensor, " entries"]
    direct: Float[Tensor, " entries"]
    error: Float[Tensor, " length"]  # total, by position
    error_direct: Float[Tensor, " length"]
    rest: float  # total effect of the offset, a skip connection and bookkeeping latents
    rest_direct: float
    slope: Float[Tensor, "length d_out"] | None  # the total gradient of the target at this place
    gap: float = 0.0  # integrated gradients: the change along the path minus the sum of the effects

    @property
    def positions(self) -> Tensor:
        """The position in the text of each entry."""
        return self.code.rows() + self.skip

    @property
    def share(self) -> float:
        """The part of the summed magnitudes of effects that latents have; the rest is the error terms'."""
        latents, errors = float(self.total.abs().sum()), float(self.error.abs().sum())
        return latents / (latents + errors) if latents + errors else 0.0


@dataclass
class Effects:
    """All effects on one target. In a frozen model the direct ones add up to ``value``, up to ``gap``."""

    value: float
    places: list[PlaceEffects]
    embedding: Float[Tensor, " length"]  # total, by position
    embedding_direct: Float[Tensor, " length"]
    mlps: dict[int, Float[Tensor, " length"]]  # block -> direct effect by position; frozen only
    mlps_total: dict[int, Float[Tensor, " length"]]
    bias: float  # of the model's own constants; frozen only
    gap: float  # value minus the sum of all direct effects; frozen only
    drift: float  # of the target when activations are written as latents and error terms; rounding

    def sums(self) -> dict[str, float]:
        """The direct effects by kind; they add up to ``value``."""
        return {
            "latents": sum(float(p.direct.double().sum()) for p in self.places),
            "errors": sum(float(p.error_direct.double().sum()) for p in self.places),
            "offsets": sum(p.rest_direct for p in self.places),
            "embedding": float(self.embedding_direct.double().sum()),
            "mlps": sum(float(x.double().sum()) for x in self.mlps.values()),
            "biases": self.bias,
            "gap": self.gap,
        }


@torch.enable_grad()
def measure(passes: Passes, target: Target, value: float, steps: int = 0) -> Effects:
    """The effects on ``target``, whose value in the untouched model is ``value``.

    ``steps`` > 0 gives integrated gradients with so many.
    """
    frozen = passes.freeze is not None
    linked = passes.run(target, cut=False)
    total = gradients(linked.value, linked)
    drift = abs(float(linked.value.detach()) - value)
    cut = passes.run(target, cut=True)
    direct, bias = _with_biases(cut) if frozen else (gradients(cut.value, cut), 0.0)
    n = len(linked.readings)
    places = [_of_place(reading, total[i], direct[i]) for i, reading in enumerate(cut.readings)]
    if steps:
        for reading, place in zip(cut.readings, places):
            _integrate(passes, target, reading, place, steps)
    mlps = {key: _by_position(x, g) for (key, x), g in zip(cut.mlps.items(), direct[n + 1 :])}
    mlps_total = {key: _by_position(x, g) for (key, x), g in zip(linked.mlps.items(), total[n + 1 :])}
    embedding = _by_position(linked.embedding, total[n])
    embedding_direct = _by_position(cut.embedding, direct[n])
    found = Effects(value, places, embedding, embedding_direct, mlps, mlps_total, bias, 0.0, drift)
    if frozen:
        found.gap = value - sum(found.sums().values())
    return found


def _with_biases(cut: Pass) -> tuple[list[Tensor | None], float]:
    """The gradients at the points, and the direct effect of all constants of the frozen model."""
    biases = list({id(b): b for b in cut.biases}.values())
    found = gradients_of([cut.value], [*cut.points, *biases], retain_graph=True)
    n = len(cut.points)
    added = [float((b.detach() * g).double().sum()) for b, g in zip(biases, found[n:]) if g is not None]
    return found[:n], sum(added)


class _Parts(NamedTuple):
    """Activation x gradient of one place, by part."""

    entries: Float[Tensor, " entries"]  # of the latents
    error: Float[Tensor, " length"]  # first positions: of the whole activation
    offset: float
    other: float  # bookkeeping latents and the skip connection


def _parts(reading: Reading, gradient: Tensor | None) -> _Parts:
    skip, sae = reading.skip, reading.place.sae
    g = (torch.zeros_like(reading.point[0]) if gradient is None else gradient[0]).to(sae.W_dec)
    features = _features(reading)
    entries = (reading.row().values * reading.slopes(g)).detach()
    error = (reading.error[0].detach() * g).sum(dim=-1)
    # The first positions are left whole.
    error[:skip] = (reading.point[0, :skip].detach().to(g) * g[:skip]).sum(dim=-1)
    other = float(entries[~features].double().sum())
    if reading.passed is not None:
        other += float((reading.passed[0] * g[skip:]).double().sum())
    return _Parts(entries[features], error, float((sae.b_dec.detach() * g[skip:]).double().sum()), other)


def _of_place(cut: Reading, total: Tensor | None, direct: Tensor | None) -> PlaceEffects:
    a, b = _parts(cut, total), _parts(cut, direct)
    code = cut.row().only(_features(cut))
    rest, rest_direct = a.offset + a.other, b.offset + b.other
    slope = None if total is None else total[0]
    return PlaceEffects(cut.place, cut.skip, code, a.entries, b.entries, a.error, b.error, rest, rest_direct, slope)


def _features(reading: Reading) -> Tensor:
    """Which entries of the first row are latents that fired, not bookkeeping."""
    code = reading.row()
    sae = reading.place.sae
    return (code.values != 0) & (code.indices < sae.n_features)


def _by_position(x: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return x.new_zeros(x.shape[1]).float()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x[0].detach().to(wide) * gradient[0].to(wide)).sum(dim=-1)


def _integrate(passes: Passes, target: Target, reading: Reading, place: PlaceEffects, steps: int) -> None:
    """Replace the total effects of a place by integrated gradients (Sundararajan et al., 2017, arXiv 1703.01365).

    The path is straight, from the activations with all latents and error terms of the place at zero (its offset alone)
    to the present ones; the first positions stay whole. The effects of latents and error terms add up to the change of
    the target along it, up to ``gap``, the error of the numerical integration.
    """
    skip, sae = reading.skip, reading.place.sae
    # Midpoints, and the two ends, which give the change of the target.
    weights = torch.cat([(torch.arange(steps) + 0.5) / steps, torch.tensor([0.0, 1.0])])
    points: list[Tensor] = []

    def along(y: Tensor) -> Tensor:
        moved, start = y.detach().clone(), sae.b_dec.detach().to(y)
        moved[:, skip:] = start + weights.to(y)[:, None, None] * (moved[:, skip:] - start)
        points.append(moved.requires_grad_())
        return points[-1].clone()

    with without_gradients(passes.root), torch.enable_grad(), reading.place.write.register(passes.model, along):
        value = target.value(passes.logits(len(weights)))
        gradient = gradient_of(value[:steps], points[-1])
    mean = gradient[:steps].mean(dim=0, keepdim=True)
    found, place.slope = _parts(reading, mean), mean[0]
    place.total, place.error, place.rest = found.entries, found.error, found.other
    added = float(found.entries.double().sum() + found.error[skip:].double().sum()) + found.other
    place.gap = float(value[-1].detach() - value[-2].detach()) - added
