"""What was done to activations before an SAE saw them: folded into its weights, done token by token, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.interop.foreign import Foreign
from saelab.sae.normalised import KINDS

# Points whose values are sums of what the layers write: their mean over the dimensions is 0 in a centred model.
WRITTEN = re.compile(
    r"(^|\.)(hook_resid_(pre|mid|post)|hook_(attn|mlp)_(out|in)|hook_embed|hook_pos_embed|hook_in|hook_out)$"
)
# TransformerLens does not centre models with RMSNorm.
RMS_NORM = re.compile(r"gemma|llama|mistral|mixtral|qwen|smollm|deepseek|olmo-2|phi-?[34]", re.I)


def per_token(how: str) -> str:
    """The note on a normalisation of each token."""
    extra = sum(KINDS[how])
    carry = f"the last {extra} latents carry" if extra > 1 else "the last latent carries"
    return f"each token is normalised ({how}) before encoding, and that is undone after decoding; {carry} what it takes"


def no_scale(origin: Path, why: str) -> NoReturn:
    """Refuse an SAE that was trained on scaled activations and does not say by which factor."""
    raise UserError(
        f"{origin} was trained on scaled activations ({why}) and does not record the factor; give input_scale "
        "(--input-scale): sqrt(d_in) / mean norm of the activations, or 1 if it is folded into the weights"
    )


def is_centred(kwargs: object, model: str | None, hook: str | None) -> bool:
    """Whether activations at ``hook`` have mean 0 over the dimensions in the model that the SAE was trained on.

    ``kwargs`` are the options TransformerLens loaded the model with. The option changes only models with LayerNorm.
    """
    wanted = isinstance(kwargs, dict) and bool(kwargs.get("center_writing_weights"))
    return wanted and not RMS_NORM.search(model or "") and (hook is None or bool(WRITTEN.search(hook)))


@torch.no_grad()
def fold_whitening(foreign: Foreign, mean: Tensor, matrix: Tensor, inverse: Tensor) -> None:
    """Fold ``z = (x - mean) @ matrix`` before the SAE and ``x = z @ inverse + mean`` behind it into its weights.

    Shapes: ``mean [d_in]``, ``matrix`` and ``inverse [d_in, d_in]``. Exact, because both maps are affine.
    """
    assert foreign.W_enc is not None and foreign.b_enc is not None, "a tied dictionary has no weights to fold this into"
    if foreign.rescale_by_decoder_norm:  # the norms select latents: fold them before they change
        norms = foreign.W_dec.norm(dim=1)
        foreign.W_dec = foreign.W_dec / norms[:, None].clamp_min(torch.finfo(norms.dtype).tiny)
        foreign.W_enc, foreign.b_enc = foreign.W_enc * norms, foreign.b_enc * norms
        foreign.rescale_by_decoder_norm = False
    mean, matrix, inverse = mean.double(), matrix.double(), inverse.double()
    encoder = matrix @ foreign.W_enc.double()
    if not foreign.subtracts_b_dec:
        shift = mean @ encoder
        foreign.b_enc = (foreign.b_enc.double() - shift).float()
        if foreign.r_mag is not None and foreign.b_mag is not None:
            foreign.b_mag = (foreign.b_mag.double() - foreign.r_mag.double().exp() * shift).float()
    foreign.W_enc = encoder.float()
    foreign.W_dec = (foreign.W_dec.double() @ inverse).float()
    foreign.b_dec = (foreign.b_dec.double() @ inverse + mean).float()
