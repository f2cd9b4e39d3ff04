"""An SAE that reads layer-normed activations, written as one that reads raw ones.

OpenAI's TopK SAEs subtract each token's mean and divide by its standard deviation before encoding, and undo both after
decoding. The undoing is linear: it needs the token's deviation on the offset and its mean on the all-ones direction.
Two bookkeeping latents behind the real ones carry these numbers, so that the code alone still gives the
reconstruction; codes are in raw units and the latents' directions are unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saelab.errors import UserError
from saelab.sae.base import SAE, build, current
from saelab.sparse import SparseCode

EPSILON = 1e-5  # as in OpenAI's and SAELens' code


class LayerNormed(SAE):
    """Wraps an SAE of layer-normed activations; ``d_sae`` counts the two bookkeeping latents at the end.

    It is not a variant: it cannot be built or trained, only read from a checkpoint.
    """

    variant = "layer_normed"

    def __init__(self, inner: SAE) -> None:
        super().__init__(inner.d_in, inner.d_sae + 2)
        self.config = {"inner": {"variant": inner.variant, "config": inner.config}}
        self.inner = inner
        ones = torch.ones(1, inner.d_in, dtype=inner.W_dec.dtype)
        dictionary = torch.cat([inner.W_dec.detach(), inner.b_dec.detach()[None], ones])
        self.W_dec = nn.Parameter(dictionary, requires_grad=False)
        self.b_dec.requires_grad_(False)

    @property
    def W_enc(self) -> Tensor:
        """The inner encoder ``[d_in, d_sae - 2]``, which reads layer-normed activations."""
        return self.inner.W_enc  # pyright: ignore[reportReturnType]

    def encode(self, x: Tensor, grads: Tensor | None = None) -> SparseCode:
        if self.training:
            raise UserError(
                "an SAE on layer-normed activations cannot be trained here, because layer norm is not linear"
            )
        mean = x.mean(dim=1, keepdim=True)
        deviation = (x - mean).std(dim=1, keepdim=True)
        # The input is divided by the deviation plus epsilon, the output multiplied by the deviation alone.
        code = self.inner.encode((x - mean) / (deviation + EPSILON))
        return self._with_bookkeeping(code, deviation[:, 0], mean[:, 0])

    def _with_bookkeeping(self, code: SparseCode, deviation: Tensor, mean: Tensor) -> SparseCode:
        n, device = code.n, code.device
        rows = torch.cat([code.rows(), torch.arange(n, device=device).repeat(2)])
        values = torch.cat([code.values * deviation[code.rows()], deviation, mean])
        own = torch.arange(2, device=device).repeat_interleave(n) + code.d_sae
        order = rows.argsort(stable=True)
        row_ptr = code.row_ptr + 2 * torch.arange(n + 1, device=device)
        return SparseCode(values[order], torch.cat([code.indices, own])[order], row_ptr, self.d_sae)


def restore(variant: str, config: Mapping[str, Any]) -> SAE:
    """The SAE that a checkpoint's configuration describes, its weights still to be loaded."""
    if variant == LayerNormed.variant:
        return LayerNormed(restore(config["inner"]["variant"], config["inner"]["config"]))
    variant, options = current(variant, config)
    return build(variant, **options)
