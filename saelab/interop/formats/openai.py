"""OpenAI's GPT-2 SAEs: one torch file each."""

from __future__ import annotations

from pathlib import Path

from saelab.errors import UserError
from saelab.interop import kind, normalisation
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import checked, matrix_shape, read_tensors, tensor_names


def sniff(path: Path) -> bool:
    """A torch file with a ``latent_bias``."""
    return path.is_file() and "latent_bias" in tensor_names(path)


def read(path: Path) -> Foreign:
    """OpenAI's GPT-2 SAEs: ``pre_bias``, ``latent_bias``; TopK ones read layer-normed activations."""
    kind.check_names(path)
    raw = read_tensors(path)
    d_sae, d_in = matrix_shape(raw, "encoder.weight", path)
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
        "latent_bias": (d_sae,),
        "pre_bias": (d_in,),
    }
    tensors = checked(raw, shapes, path)
    activation, state = str(raw.get("activation", "ReLU")), raw.get("activation_state_dict") or {}
    topk = activation == "TopK"
    k, after = raw.get("activation.k", state.get("k")), raw.get("activation.postact_fn", state.get("postact_fn"))
    if not topk and activation != "ReLU":
        raise UserError(f"{path}: activation {activation!r} has no counterpart here, only TopK and ReLU have")
    if topk and after not in {None, "ReLU"}:
        raise UserError(f"{path}: TopK followed by {after!r} has no counterpart here; only ReLU has")
    return Foreign(
        format="openai",
        architecture="topk" if topk else "relu",
        W_enc=tensors["encoder.weight"].T,
        b_enc=tensors["latent_bias"],
        W_dec=tensors["decoder.weight"].T,
        b_dec=tensors["pre_bias"],
        k=int(k) if k is not None else None,
        normalize="layer_norm" if topk else None,
        notes=[normalisation.per_token("layer_norm")] if topk else [],
    )


register(Format("openai", ("*.pt", "*.pth"), sniff, read, by_content=True))
