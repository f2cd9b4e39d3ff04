"""What an SAE computes at inference, in the vocabulary other tools share.

However a variant was trained, in eval mode it is one of few forms: TopK, AbsTopK, thresholds (one- or two-sided), ReLU,
gated, matching pursuit. SAELens' names for architectures and tensors are the ones used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.sae.base import SAE, LinearSAE
from saelab.sae.matching_pursuit import MatchingPursuit

TWO_SIDED = "two_sided_threshold"  # |u| > threshold, sign kept: no other tool has it


@dataclass(frozen=True)
class InferenceForm:
    """``architecture`` is SAELens' name, or ``TWO_SIDED``; ``tensors`` and ``config`` carry SAELens' keys."""

    architecture: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def in_saelens(self) -> bool:
        """Whether SAELens can load it."""
        return self.architecture != TWO_SIDED


@torch.no_grad()
def inference_form(sae: SAE) -> InferenceForm | None:
    """The form ``sae`` has in eval mode; None when its codes need more than the activations (gradients, say)."""
    if isinstance(sae, MatchingPursuit):
        config = {
            "residual_threshold": sae.residual_stop.item(),
            "max_iterations": sae.n_steps,
            "stop_on_duplicate_support": sae.stop_on_repeat,
            "apply_b_dec_to_input": sae.use_b_dec,
        }
        return InferenceForm("matching_pursuit", {"W_dec": sae.W_dec, "b_dec": sae.b_dec}, config)
    threshold = sae.inference_threshold()
    if not isinstance(sae, LinearSAE) or (sae.saelens is None and threshold is None):
        return None
    tensors: dict[str, Tensor] = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    config: dict[str, Any] = {"apply_b_dec_to_input": sae.b_in is not None}
    architecture = sae.saelens or TWO_SIDED
    if architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
        tensors |= {name: getattr(sae, name) for name in ("r_mag", "b_mag")}
    elif threshold is not None:
        tensors["threshold"] = threshold.to(sae.W_dec.dtype).expand(sae.d_sae)
    elif architecture in {"topk", "abstopk"}:
        config |= {"k": int(sae.config["k"]), "rescale_acts_by_decoder_norm": False}
    return InferenceForm(architecture, tensors, config)


def why_no_form(sae: SAE) -> str:
    """Why :func:`inference_form` has no answer for ``sae``, as the rest of a sentence about it."""
    if sae.needs_grads:
        return "uses gradients of the language model's loss at inference"
    if not isinstance(sae, LinearSAE):
        return "has no linear encoder on raw activations"
    return "selects latents by a rule of its own (its class declares neither `saelens` nor `inference_threshold()`)"


@torch.no_grad()
def doubled(form: InferenceForm) -> InferenceForm:
    """A signed form as an unsigned one of twice the width: latent ``j + d_sae`` is the negative pole of ``j``.

    Exact: AbsTopK becomes TopK on ``[u, -u]`` with the same k, a two-sided threshold becomes JumpReLU.
    """
    architecture = {"abstopk": "topk", TWO_SIDED: "jumprelu"}[form.architecture]
    t = form.tensors
    tensors = {
        "W_enc": torch.cat([t["W_enc"], -t["W_enc"]], dim=1),
        "b_enc": torch.cat([t["b_enc"], -t["b_enc"]]),
        "W_dec": torch.cat([t["W_dec"], -t["W_dec"]]),
        "b_dec": t["b_dec"],
    }
    if "threshold" in t:
        tensors["threshold"] = t["threshold"].repeat(2)
    return InferenceForm(architecture, tensors, form.config)
