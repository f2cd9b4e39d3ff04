"""An SAE of another tool in one canonical form, and its translation into one of our variants.

Canonical form: encode = act((x - b_dec * subtracts_b_dec) W_enc + b_enc), decode = f W_dec + b_dec, shapes as ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.sae import SAE, Normalised, build


@dataclass
class Foreign:
    """An SAE as read. ``architecture``: topk, abs_topk, jump_relu, relu, gated or matching_pursuit."""

    format: str
    architecture: str
    W_dec: Tensor  # [d_sae, d_in], of a transcoder [d_sae, d_out]
    b_dec: Tensor  # [d_in], of a transcoder [d_out]
    W_enc: Tensor | None = None  # [d_in, d_sae]; none for tied dictionaries
    b_enc: Tensor | None = None  # [d_sae]; the gate's bias for gated SAEs
    k: int | None = None
    threshold: Tensor | None = None  # [d_sae]
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    subtracts_b_dec: bool = True
    normalize: str | None = (
        None  # what is done to each token before encoding: layer_norm, constant_norm_rescale, center
    )
    rescale_by_decoder_norm: bool = False
    input_scale: float = 1.0  # the SAE saw activations multiplied by this, and its output was divided by it
    transcodes: bool = False  # it reconstructs another place; nothing is subtracted from its input then
    W_skip: Tensor | None = None  # [d_out, d_in]
    output_scale: float = 1.0  # of a transcoder: its target was multiplied by this
    pursuit: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    known_from: dict[str, str] = field(default_factory=dict)  # entry of the metadata -> how it is known
    notes: list[str] = field(default_factory=list)  # unusual facts about it, one sentence each

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_dec.shape[1] if self.W_enc is None else self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Latents."""
        return self.W_dec.shape[0]

    @torch.no_grad()
    def to_sae(self) -> SAE:
        """Our variant with the same codes and reconstructions, in eval mode."""
        if not 0 < self.input_scale < float("inf"):
            raise UserError(f"input_scale={self.input_scale} is not a positive number; correct it")
        target = {"d_out": self.W_dec.shape[1], "skip": self.W_skip is not None} if self.transcodes else {}
        if target and self.normalize is not None:
            raise UserError(
                f"this transcoder reads activations normalised by {self.normalize}, which is not known here"
            )
        sae = build(self.architecture, self.d_in, self.d_sae, **self._config(), **target)
        weights = self._weights()
        parameters = dict(sae.named_parameters())
        for name, value in weights.items():
            if parameters[name].shape != value.shape:
                raise UserError(f"{name} has shape {tuple(value.shape)}, expected {tuple(parameters[name].shape)}")
            parameters[name].copy_(value)
        if self.transcodes:
            sae.rescale_(1 / self.output_scale, 1 / self.input_scale)
        elif self.input_scale != 1.0:
            sae.rescale_(1 / self.input_scale)
        return (sae if self.normalize is None else Normalised(sae, self.normalize)).eval()

    def _config(self) -> dict[str, Any]:
        if self.architecture in {"topk", "abs_topk"}:
            if self.k is None:
                raise UserError(f"this {self.format} SAE does not record k, the number of latents per token")
            if isinstance(self.k, bool) or not isinstance(self.k, int) or not 1 <= self.k <= self.d_sae:
                raise UserError(
                    f"this {self.format} SAE has k={self.k!r}, which is not a number from 1 to {self.d_sae}"
                )
            return {"k": self.k}
        if self.architecture == "jump_relu" and not self.transcodes:
            return {"apply_b_dec_to_input": self.subtracts_b_dec}
        return dict(self.pursuit)

    def _weights(self) -> dict[str, Tensor]:
        """Our variant's parameters, in units of the data the SAE was trained on."""
        weights = {"W_dec": self.W_dec, "b_dec": self.b_dec}
        if self.W_enc is None or self.b_enc is None:
            # A tied dictionary that does not subtract its offset does not add it either.
            return weights if self.subtracts_b_dec else {**weights, "b_dec": torch.zeros_like(self.b_dec)}
        weights |= {"W_enc": self.W_enc, "b_enc": self.b_enc}
        more = {"threshold": self.threshold, "r_mag": self.r_mag, "b_mag": self.b_mag}
        more["W_skip"] = self.W_skip
        weights |= {name: value for name, value in more.items() if value is not None}
        if not self.subtracts_b_dec and self.architecture != "jump_relu" and not self.transcodes:
            # All of ours but JumpReLU subtract b_dec: the biases give it back.
            shift = (self.b_dec.double() @ self.W_enc.double()).to(self.b_dec.dtype)
            weights["b_enc"] = self.b_enc + shift
            if self.r_mag is not None and self.b_mag is not None:
                weights["b_mag"] = self.b_mag + self.r_mag.exp() * shift
        if self.rescale_by_decoder_norm:
            # pre * |d| selects, f / |d| decodes: the same as a dictionary of unit rows.
            norms = self.W_dec.norm(dim=1)
            weights["W_dec"] = self.W_dec / norms[:, None].clamp_min(torch.finfo(norms.dtype).tiny)
            weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms, weights["b_enc"] * norms
        return weights
