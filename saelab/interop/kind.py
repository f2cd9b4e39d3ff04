"""Tell SAEs, which reconstruct what they read, from transcoders and crosscoders, which write to another place.

Their files often have the same names, tensors and shapes as an SAE's, so every cue counts: configuration fields, hook
points, widths, tensors, and the names of folders and repositories.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.interop.origin import Origin

SKIP = ("affine_skip_connection", "W_skip", "skip.weight")  # tensors that lead around the latents
UNRELATED = 0.05  # median cosine of the two directions of a latent; trained SAEs have 0.2 and more
MAX_SETTINGS = 2**20  # bytes
DECODERS = ("W_dec", "decoder.weight", "decoder_linear.weight")
# A word of a name; "clt" is a cross-layer transcoder, L5TC and LXTC are Llama Scope's transcoders.
WORDS = re.compile(
    r"(?<![a-z])(skip[-_ ]?)?(transcoder|crosscoder|clt)s?(?![a-z])|(?<![A-Za-z0-9])L(\d+|X)TC(?=-|$)", re.I
)


def refuse(origin: Path, what: str, evidence: str) -> NoReturn:
    """Raise the UserError for what is no SAE; ``evidence`` says how it was recognised."""
    article = "an" if what[0] in "aeiou" else "a"
    raise UserError(f"{origin} is {article} {what}, not an SAE: {evidence}; give the path of an SAE")


def check_hooks(origin: Path, hook_in: object, hook_out: object, source: str = "its configuration") -> None:
    """Refuse what reads one hook point and writes another. A hook point that is not recorded decides nothing."""
    if hook_in and hook_out and hook_in != hook_out:
        refuse(origin, "transcoder", f"by {source} it reads {hook_in} and writes {hook_out}")


def check_type(origin: Path, value: object, field: str) -> None:
    """Refuse what the field ``field`` of the configuration calls by the name of something else."""
    for word in ("transcoder", "crosscoder"):
        if word in str(value).lower():
            refuse(origin, word, f"its configuration has {field}={value!r}")


def check_names(path: Path, sure: bool = False) -> None:
    """Refuse a path whose repository or folders carry the name of a transcoder or crosscoder.

    Only for files that do not say themselves what they are; ``sure`` if they cannot be an SAE in any case.
    """
    place = Origin.of(path)
    for name in (place.repository, *place.inside.split("/")):
        if found := WORDS.search(name):
            hint = "" if sure else "; the file itself does not say (rename it if it is one)"
            refuse(path, _what(found), f"by the name {name!r}{hint}")


def says_transcoder(path: Path) -> bool:
    """Whether the repository or a folder of ``path`` carries the name of transcoders of single layers."""
    place = Origin.of(path)
    found = [WORDS.search(name) for name in (place.repository, *place.inside.split("/"))]
    return any(match is not None and _what(match) == "transcoder" for match in found)


def check_unknown(path: Path) -> None:
    """Refuse by name what is in no format of SAEs: circuit-tracer's sets of transcoders, for example."""
    check_names(path, sure=True)
    settings = (path if path.is_dir() else path.parent) / "config.yaml"
    if settings.is_file() and settings.stat().st_size < MAX_SETTINGS:
        text = settings.read_text(encoding="utf-8", errors="replace")
        if "feature_output_hook" in text:
            raise UserError(f"{path} is a set of circuit-tracer's transcoders; name one of its layer_N.safetensors")


def doubt(W_enc: Tensor, W_dec: Tensor) -> str | None:
    """The reason to doubt an encoder ``[d_in, d_sae]`` and a decoder ``[d_sae, d_in]``: unrelated directions.

    Training an SAE turns each latent's two directions to each other; a transcoder's lie in different spaces, and many
    MLPs write against what they read. That is a hint, no proof.
    """
    cosine = torch.nn.functional.cosine_similarity(W_enc.T, W_dec, dim=1).median().item()
    if cosine >= UNRELATED:
        return None
    how = "unrelated" if cosine > -UNRELATED else "opposed"
    return f"encoder and decoder directions are {how} (median cosine {cosine:.3f}), as a transcoder's are"


def _what(found: re.Match[str]) -> str:
    word = (found[2] or "transcoder").lower()
    return "cross-layer transcoder" if word == "clt" else word


def check_tensors(origin: Path, tensors: Mapping[str, Any], known: Container[str] = ()) -> None:
    """Refuse weights that lead around the latents, but for ``known`` ones, or that serve several layers."""
    for name in SKIP:
        if name in tensors and name not in known:
            refuse(origin, "transcoder", f"it holds a skip connection, {name}")
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.ndim == 3 and str(name).lower().startswith(("w_", "encoder", "decoder")):
            shape = " x ".join(map(str, value.shape))
            refuse(origin, "crosscoder or cross-layer transcoder", f"{name} serves several layers ({shape})")


def check_decoder(origin: Path, name: str, tensors: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Refuse weights whose decoder ``name`` writes another width than the encoder reads.

    ``shape`` is what an SAE's decoder would have. The offset of such a file has the decoder's width.
    """
    value = tensors[name]
    if name not in DECODERS or value.ndim != 2 or sum(a != b for a, b in zip(value.shape, shape)) != 1:
        return
    d_out, d_in = next((a, b) for a, b in zip(value.shape, shape) if a != b)
    offsets = {t.shape[0] for key, t in tensors.items() if isinstance(t, Tensor) and t.ndim == 1 and "dec" in str(key)}
    if d_out in offsets:
        refuse(origin, "transcoder", f"it reads activations of width {d_in} and writes width {d_out}")
