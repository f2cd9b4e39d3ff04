"""An SAE that reads activations normalised token by token, written as one that reads raw ones.

Before encoding, a number of each token is subtracted or divided out, and after decoding that is undone:

- ``layer_norm``: subtract the mean over the dimensions, divide by the standard deviation (OpenAI's TopK SAEs);
- ``constant_norm_rescale``: scale to norm sqrt(d_in);
- ``center``: subtract the mean (SAEs of models whose writing weights TransformerLens has centred).

The undoing is linear in numbers of the token: its deviation times the offset, its mean times the all-ones direction.
Bookkeeping latents behind the real ones carry these numbers, so that the code alone still gives the reconstruction;
codes are in raw units and the latents' directions are unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.sae.base import SAE, build, current
from saelab.sae.linear import LinearSAE
from saelab.sparse import SparseCode

EPSILON = 1e-5  # of layer_norm, as in OpenAI's and SAELens' code
BEFORE = "layer_normed"  # how 0.1.0 calls an SAE of layer-normed activations
# Per normalisation: whether the inner SAE's offset is scaled, and whether a mean was subtracted.
KINDS = {"layer_norm": (True, True), "constant_norm_rescale": (True, False), "center": (False, True)}


class Normalised(SAE):
    """Wraps an SAE of normalised activations; ``d_sae`` counts the bookkeeping latents at the end.

    It is not a variant: it cannot be built or trained, only read from a checkpoint. Raises UserError for another
    normalisation than those of ``KINDS``.
    """

    variant = "normalised"

    def __init__(self, inner: SAE, normalize: str = "layer_norm") -> None:
        if normalize not in KINDS:
            raise UserError(f"normalize={normalize!r} is not one of {', '.join(KINDS)}")
        self.scales, self.shifts = KINDS[normalize]
        self.n_bookkeeping = self.scales + self.shifts
        super().__init__(inner.d_in, inner.d_sae + self.n_bookkeeping)
        self.config = {"normalize": normalize, "inner": {"variant": inner.variant, "config": inner.config}}
        self.normalize, self.inner, self.signed = normalize, inner, inner.signed
        rows = [inner.W_dec.detach()]
        if self.scales:
            rows.append(inner.b_dec.detach()[None])
        else:
            self.b_dec.data.copy_(inner.b_dec.detach())
        if self.shifts:
            rows.append(torch.ones(1, inner.d_in, dtype=inner.W_dec.dtype))
        self.W_dec = nn.Parameter(torch.cat(rows), requires_grad=False)
        self.b_dec.requires_grad_(False)

    @property
    def W_enc(self) -> Tensor:
        """The inner encoder ``[d_in, d_sae]`` without bookkeeping latents; it reads normalised activations."""
        return self.inner.W_enc  # pyright: ignore[reportReturnType]

    @property
    def reader(self) -> SAE:
        return self.inner

    def as_read(self, x: Tensor) -> Tensor:
        return self.normed(x)[0]

    @torch.no_grad()
    def folded(self) -> SAE | None:
        """For ``center``, an SAE of raw activations with the same codes; None for what no linear encoder can do.

        The subtraction of the mean is folded into the encoder. Its reconstruction lacks each token's mean.
        """
        if self.normalize != "center" or not isinstance(self.inner, LinearSAE):
            return None
        sae = copy.deepcopy(self.inner)
        column_means = sae.W_enc.double().mean(dim=0)
        # (x - mean - b) W = (x - b) W' + (b W' - b W), with W' = W minus its columns' means.
        shift = torch.zeros_like(column_means) if sae.b_in is None else sae.b_dec.double().sum() * column_means
        sae.W_enc.sub_(column_means.to(sae.W_enc.dtype))
        sae.b_enc.sub_(shift.to(sae.b_enc.dtype))
        b_mag, r_mag = getattr(sae, "b_mag", None), getattr(sae, "r_mag", None)
        if isinstance(b_mag, Tensor) and isinstance(r_mag, Tensor):  # a gated SAE's second bias, on the same product
            b_mag.sub_((r_mag.double().exp() * shift).to(b_mag.dtype))
        return sae

    def encode(self, x: Tensor, grads: Tensor | None = None) -> SparseCode:
        if self.training:
            raise UserError(
                f"an SAE that reads normalised activations ({self.normalize}) cannot be trained here; train a new one"
            )
        normed, scale, mean = self.normed(x)
        # Of each token, [n]; the bookkeeping latents' values.
        numbers = [number[:, 0] for number, kept in ((scale, self.scales), (mean, self.shifts)) if kept]
        return self._with_bookkeeping(self.inner.encode(normed), scale[:, 0], numbers)

    def normed(self, x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor, Tensor]:
        """What the inner SAE reads, and the scale and the mean ``[n, 1]`` of each token, which it does not see."""
        mean = x.mean(dim=1, keepdim=True) if self.shifts else torch.zeros_like(x[:, :1])
        centred, scale = x - mean, torch.ones_like(x[:, :1])
        if self.normalize == "layer_norm":
            scale = centred.std(dim=1, keepdim=True)
            # The input is divided by the deviation plus epsilon, the output multiplied by the deviation alone.
            return centred / (scale + EPSILON), scale, mean
        if self.normalize == "constant_norm_rescale":
            scale = x.norm(dim=1, keepdim=True) / self.d_in**0.5
            return x / scale.clamp_min(torch.finfo(x.dtype).tiny), scale, mean
        return centred, scale, mean

    def _with_bookkeeping(self, code: SparseCode, scale: Tensor, numbers: list[Tensor]) -> SparseCode:
        n, device, count = code.n, code.device, len(numbers)
        rows = torch.cat([code.rows(), torch.arange(n, device=device).repeat(count)])
        values = torch.cat([code.values * scale[code.rows()], *numbers])
        own = torch.arange(count, device=device).repeat_interleave(n) + code.d_sae
        order = rows.argsort(stable=True)
        row_ptr = code.row_ptr + count * torch.arange(n + 1, device=device)
        return SparseCode(values[order], torch.cat([code.indices, own])[order], row_ptr, self.d_sae)


def restore(variant: str, config: Mapping[str, Any]) -> SAE:
    """The SAE that a checkpoint's configuration describes, its weights still to be loaded."""
    if variant in {Normalised.variant, BEFORE}:
        inner = restore(config["inner"]["variant"], config["inner"]["config"])
        return Normalised(inner, config.get("normalize", "layer_norm"))
    variant, options = current(variant, config)
    return build(variant, **options)
