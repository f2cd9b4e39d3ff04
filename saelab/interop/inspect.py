"""What a checkpoint is: format, shapes, norms, hook, and what is odd about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab import checkpoint
from saelab.interop.detect import detect, is_ours
from saelab.sae import SAE

DEAD_RATIO = 1e-3  # an encoder this much shorter than the median is taken for collapsed
DUPLICATE = 0.999  # cosine above which two rows are one direction


@torch.no_grad()
def inspect(path: Path | str) -> dict[str, Any]:
    """Facts about the SAE at ``path`` as a flat dictionary; ``notes`` lists oddities, one sentence each."""
    path = Path(path)
    if is_ours(path):
        sae, metadata, notes, form = checkpoint.load_sae(path), checkpoint.load_metadata(path), [], "saelab"
    else:
        found = detect(path)
        foreign = found.read(path)
        sae, metadata, notes, form = foreign.to_sae(), foreign.metadata, list(foreign.notes), found.name
    W_dec: Tensor = sae.W_dec.float()
    norms = W_dec.norm(dim=1)
    facts = {
        "path": str(path),
        "format": form,
        "variant": sae.variant,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "parameters": sum(p.numel() for p in sae.parameters()),
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "config": {k: v for k, v in sae.config.items() if k not in {"d_in", "d_sae"}},
        "model": metadata.get("model_name"),
        "hook": metadata.get("hook_name") or metadata.get("hf_hook_name"),
        "decoder_norm": _spread(norms),
        "b_dec_norm": sae.b_dec.norm().item(),
        "notes": notes,
    }
    if (norms - 1).abs().max() > 1e-3:
        notes.append("decoder rows are not of unit norm")
    if not facts["hook"]:
        notes.append("the hook point is not recorded")
    _encoder(sae, facts, notes)
    return facts


def _encoder(sae: SAE, facts: dict[str, Any], notes: list[str]) -> None:
    W_enc = getattr(sae, "W_enc", None)
    if W_enc is None:
        return
    norms = W_enc.float().norm(dim=0)
    facts["encoder_norm"] = _spread(norms)
    collapsed = int((norms < DEAD_RATIO * norms.median()).sum())
    facts["dead_estimate"] = collapsed
    if collapsed:
        notes.append(f"{collapsed} latents have a collapsed encoder and can hardly ever fire")
    alignment = torch.nn.functional.cosine_similarity(W_enc.float().T, sae.W_dec[: W_enc.shape[1]].float(), dim=1)
    facts["encoder_decoder_cosine"] = alignment.median().item()
    if alignment.median() < 0:
        notes.append("encoder and decoder point in opposite directions: a transposed or wrong matrix?")


def _spread(values: Tensor) -> dict[str, float]:
    return {"min": values.min().item(), "median": values.median().item(), "max": values.max().item()}
