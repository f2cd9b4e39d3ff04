"""What an SAE computes at inference, in the terms that other tools share.

However a variant was trained, in eval mode it has one of a few forms: TopK, AbsTopK, thresholds (one- or two-sided),
ReLU, gated, matching pursuit. ``SAE.inference_form`` gives it, with SAELens' names for architectures and tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TRANSCODERS = {"standard": "{}transcoder", "jumprelu": "jumprelu_{}transcoder"}  # SAELens' names, by the rule's
TWO_SIDED = "two_sided_threshold"  # |u| > threshold, sign kept: no other tool has it


@dataclass(frozen=True)
class InferenceForm:
    """``architecture`` is SAELens' name of the rule, or ``TWO_SIDED``; ``tensors`` and ``config`` carry SAELens' keys.

    ``d_out`` is the width of a transcoder's target, which SAELens knows under other names (:attr:`name`).
    """

    architecture: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    d_out: int | None = None

    @property
    def in_saelens(self) -> bool:
        """Whether SAELens can load it."""
        return self.architecture != TWO_SIDED if self.d_out is None else self.architecture in TRANSCODERS

    @property
    def name(self) -> str:
        """SAELens' name of the whole, where it can load it."""
        if self.d_out is None:
            return self.architecture
        return TRANSCODERS[self.architecture].format("skip_" if "W_skip" in self.tensors else "")


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
        **{name: t[name] for name in ("b_dec", "W_skip") if name in t},
    }
    if "threshold" in t:
        tensors["threshold"] = t["threshold"].repeat(2)
    return InferenceForm(architecture, tensors, form.config, form.d_out)
