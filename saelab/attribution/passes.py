"""One differentiable pass of a language model with its activations at some places written as latents and error terms.

At each place the activations are ``y = sum_j c_j d_j + b_dec + e``: what the latents write, the offset, and the error
term. A *linked* pass lets gradients through all places, so that they are total effects; a *cut* one makes ``y`` of each
place an input of its own, so that they are effects along paths that avoid the other places. The model's output is that
of the untouched model in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.attribution.frozen import Frozen, before_cap
from saelab.attribution.places import Place
from saelab.attribution.target import Target
from saelab.lm.gradients import gradients_of
from saelab.lm.offload import device_of
from saelab.lm.route import Edit
from saelab.lm.sites import locate, underlying
from saelab.lm.unwrapped import frozen as without_gradients
from saelab.sparse import SparseCode
from saelab.steering.generation import forward


@dataclass(frozen=True)
class Text:
    """The prompt as tokens. The first ``skip`` positions are left whole: SAEs are trained without them."""

    ids: Int[Tensor, "1 length"]
    strings: list[str]
    skip: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.ids.shape[1]


@dataclass
class Reading:
    """What one place showed in a pass of ``rows`` copies of a text."""

    place: Place
    skip: int
    code: SparseCode  # of rows x (length - skip) tokens
    point: Float[Tensor, "rows length d_out"]  # activations, in the graph of the pass
    error: Float[Tensor, "rows length d_out"]  # point minus what the SAE explains; all of it at the first positions
    passed: Float[Tensor, "rows tokens d_out"] | None = None  # what a skip connection gives, where it is not followed

    @property
    def tokens(self) -> int:
        """Encoded tokens per row."""
        return self.point.shape[1] - self.skip

    def slopes(self, gradient: Float[Tensor, "length d_out"], row: int = 0) -> Float[Tensor, " entries"]:
        """The derivative along the direction of each entry of one row's code."""
        code = self.row(row)
        W_dec = self.place.sae.W_dec.detach()
        at = gradient[self.skip :].to(W_dec)
        parts = [
            (at[rows] * W_dec[latents]).sum(dim=1)
            for rows, latents in zip(code.rows().split(8192), code.indices.split(8192))
        ]
        return torch.cat(parts) if parts else at.new_zeros(0)

    def row(self, row: int = 0) -> SparseCode:
        """The code of one copy of the text, without gradients."""
        return self.code[row * self.tokens : (row + 1) * self.tokens].detach()


@dataclass
class Pass:
    """Predictions after the prompt, and the points at which gradients can be taken."""

    value: Float[Tensor, " rows"]  # of the target
    readings: list[Reading]
    embedding: Float[Tensor, "rows length d_model"]
    mlps: dict[int, Float[Tensor, "rows length d_model"]] = field(default_factory=dict)  # block -> output, frozen only
    biases: list[Tensor] = field(default_factory=list)  # constants of the frozen model

    @property
    def points(self) -> list[Tensor]:
        """Activations of the places, then the embedding, then MLPs without a transcoder."""
        return [*(r.point for r in self.readings), self.embedding, *self.mlps.values()]


class Passes:
    """Runs the passes of one prompt and one target."""

    def __init__(self, model: nn.Module, places: Sequence[Place], text: Text, freeze: Frozen | None = None) -> None:
        self.model, self.places, self.text, self.freeze = model, list(places), text, freeze
        self.root = underlying(model)
        self.device = device_of(model)

    def logits(self, rows: int = 1) -> Float[Tensor, "rows vocabulary"]:
        """The model's predictions after the prompt, with whatever hooks are set; of a frozen model before a cap."""
        ids = self.text.ids.to(self.device).expand(rows, -1)
        with contextlib.ExitStack() as stack:
            seen = [] if self.freeze is None else stack.enter_context(before_cap(self.model))
            logits = forward(self.root, ids, torch.ones_like(ids), last_only=True)[0]
        return (seen[-1] if seen else logits)[:, -1]

    @torch.enable_grad()
    def run(self, target: Target, *, cut: bool, rows: int = 1) -> Pass:
        """A pass of ``rows`` copies of the text."""
        readings: list[Reading] = []
        inputs: dict[int | None, Tensor] = {}

        def leaf(key: int | None, x: Tensor) -> Tensor:
            inputs[key] = x.detach().requires_grad_()
            return inputs[key].clone()  # later modules may write into it

        with contextlib.ExitStack() as stack:
            stack.enter_context(without_gradients(self.root))
            first = locate(self.model, "blocks.0.hook_resid_pre")
            stack.enter_context(first.register(self.model, lambda x: leaf(None, x)))
            if self.freeze is not None:
                self.freeze.biases.clear()
                covered = {p.write.place for p in self.places}
                stack.enter_context(self.freeze.apply(self.model, covered, leaf))
            for place in self.places:
                stack.enter_context(without_gradients(place.sae))
                edit = self._edit(place, readings, cut)
                stack.enter_context(place.route.register(self.model, edit))
            value = target.value(self.logits(rows))
        mlps = {key: x for key, x in inputs.items() if key is not None}
        biases = [] if self.freeze is None else list(self.freeze.biases)
        return Pass(value, readings, inputs[None], mlps, biases)

    def _edit(self, place: Place, readings: list[Reading], cut: bool) -> Edit:
        sae, skip = place.sae, self.text.skip
        linear = self.freeze is not None

        def edit(x: Tensor, y: Tensor) -> Tensor:
            rows = x[:, skip:].flatten(0, 1).to(sae.W_dec)
            # Only frozen passes, and edges into latents, ask for gradients through the encoder.
            with torch.set_grad_enabled(cut or linear):
                code = sae.encode(rows)
                whole = sae.decode(code)
                passed = sae.skipped(rows)
                explained = whole if passed is None else whole + passed
                explained = explained.unflatten(0, (x.shape[0], -1))
                error = y.to(explained).clone()
                error[:, skip:] = error[:, skip:] - explained
            if cut:
                point = y.detach().requires_grad_()
                new = point.clone()
                if linear and passed is not None:
                    through = (passed - passed.detach()).unflatten(0, (x.shape[0], -1)).to(new)
                    new = torch.cat([new[:, :skip], new[:, skip:] + through], dim=1)
            elif linear:
                fixed = error.detach()
                point = (torch.cat([fixed[:, :skip], fixed[:, skip:] + explained], dim=1)).to(y)
                point = point if point.requires_grad else point.requires_grad_()
                new = point.clone()
            else:
                point = y if y.requires_grad else y.detach().requires_grad_()
                new = point.clone()
            outside = None if linear or passed is None else passed.detach().unflatten(0, (x.shape[0], -1))
            readings.append(Reading(place, skip, code, point, error, outside))
            return new

        return edit


def gradients(of: Tensor, passed: Pass) -> list[Tensor | None]:
    """The gradient of ``of.sum()`` at each of the points, None where it has none."""
    return gradients_of([of], passed.points, retain_graph=True)


def batches(count: int, size: int) -> Iterator[range]:
    """``range(count)`` in pieces."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
