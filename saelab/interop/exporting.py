"""Writing an SAE for another tool, with a numerical proof that it computes the same."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab._version import __version__
from saelab.errors import UserError, near_matches
from saelab.files import save_plain
from saelab.interop.detection import read
from saelab.lm.hook_names import layer_of
from saelab.sae import SAE
from saelab.sae.inference import TWO_SIDED, InferenceForm, doubled, inference_form
from saelab.sae.weights import SAELENS_VERSION

SIGNED = {"abstopk", TWO_SIDED}
# Two float32 evaluations of one formula: dot products of length d_in and sums of k terms, with near-ties gap-checked.
TOLERANCE = 1e-4


class Proof(NamedTuple):
    """Largest differences on a probe batch, relative to the largest activation value, and to the data's norm."""

    encode: float
    decode: float


def export(
    sae: SAE, folder: Path | str, to: str, metadata: Mapping[str, Any] | None = None, probe: Tensor | None = None
) -> Proof:
    """Write ``sae`` to a new ``folder`` in the format ``to``: saelens, sparsify or dictionary-learning.

    Signed SAEs become the equivalent unsigned dictionary of twice the width where the format knows no sign. The files
    are read back, both SAEs run on ``probe [n, d_in]`` (by default 256 random activations), and nothing is kept when
    they differ by more than ``TOLERANCE``.
    """
    if to not in WRITERS:
        raise UserError(f"unknown format {to!r}: {near_matches(to, WRITERS)}")
    form = inference_form(sae)
    if form is None:
        raise UserError(f"a {sae.variant} SAE whose inference needs gradients has no counterpart in {to}")
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists; name a new folder")
    if form.architecture in SIGNED and not (to == "saelens" and form.in_saelens):
        form = doubled(form)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        WRITERS[to](form, temporary, dict(metadata or {}))
        proof = prove(sae, read(temporary).to_sae(), random_probe(sae) if probe is None else probe)
        if max(proof) > TOLERANCE:
            raise UserError(
                f"the {to} export differs from the SAE by {proof.encode:.1e} (encode) and {proof.decode:.1e} (decode), "
                f"more than {TOLERANCE:.0e}; nothing was written"
            )
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return proof


@torch.no_grad()
def prove(ours: SAE, theirs: SAE, x: Tensor) -> Proof:
    """How far two SAEs are apart on ``x [n, d_in]``; the second may be the doubled form of the first."""
    a, b = ours.encode(x), theirs.encode(x)
    left, right = a.dense(), b.dense()
    if theirs.d_sae == 2 * ours.d_sae:
        right = right[:, : ours.d_sae] - right[:, ours.d_sae :]
    top = left.abs().max().clamp_min(torch.finfo(left.dtype).tiny)
    norm = x.norm(dim=1).max()
    decode = (ours.decode(a) - theirs.decode(b)).norm(dim=1).max() / norm
    return Proof(((left - right).abs().max() / top).item(), decode.item())


def random_probe(sae: SAE) -> Tensor:
    """Random activations that use the dictionary: the offset plus a few rows with random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(256, sae.d_sae, generator=generator)
    weights *= torch.rand(256, sae.d_sae, generator=generator) < min(1.0, 16 / sae.d_sae)
    scale = sae.b_dec.norm().clamp_min(1.0)
    return (sae.b_dec + scale * weights @ sae.W_dec.float()).detach()


def _saelens(form: InferenceForm, folder: Path, metadata: dict[str, Any]) -> None:
    _save(form.tensors, folder / "sae_weights.safetensors")
    d_sae, d_in = form.tensors["W_dec"].shape
    config = {
        "architecture": form.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        **form.config,
        "metadata": {**metadata, "sae_lens_version": SAELENS_VERSION, "saelab_version": __version__},
    }
    config["metadata"].pop("saelab", None)  # it describes the original, not this form
    _json(config, folder / "cfg.json")


def _sparsify(form: InferenceForm, folder: Path, metadata: dict[str, Any]) -> None:
    if form.architecture != "topk":
        raise UserError(f"sparsify knows TopK only; this SAE is {form.architecture} at inference")
    t = form.tensors
    tensors = {"encoder.weight": t["W_enc"].T, "encoder.bias": _subtracting(form), "W_dec": t["W_dec"]}
    _save({**tensors, "b_dec": t["b_dec"]}, folder / "sae.safetensors")
    d_sae, d_in = t["W_dec"].shape
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": d_sae}
    config |= {"k": form.config["k"], "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in}
    _json(config, folder / "cfg.json")


def _dictionary_learning(form: InferenceForm, folder: Path, metadata: dict[str, Any]) -> None:
    t = form.tensors
    encoder = {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T} if "W_enc" in t else {}
    if form.architecture == "topk":
        name = "AutoEncoderTopK"
        state = encoder | {"encoder.bias": _subtracting(form), "b_dec": t["b_dec"]}
        state |= {"k": torch.tensor(form.config["k"], dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    elif form.architecture == "jumprelu":
        name = "JumpReluAutoEncoder"
        # This class subtracts no b_dec; the encoder's bias takes it.
        b_enc = t["b_enc"] if not form.config["apply_b_dec_to_input"] else t["b_enc"] - t["b_dec"] @ t["W_enc"]
        state = {**{key: t[key] for key in ("W_enc", "W_dec", "b_dec", "threshold")}, "b_enc": b_enc}
    elif form.architecture == "standard":
        name, state = "AutoEncoder", encoder | {"encoder.bias": _subtracting(form), "bias": t["b_dec"]}
    elif form.architecture == "gated":
        name = "GatedAutoEncoder"
        state = encoder | {"decoder_bias": t["b_dec"], "gate_bias": t["b_gate"], "r_mag": t["r_mag"]}
        state["mag_bias"] = t["b_mag"]
    else:
        raise UserError(f"dictionary_learning has no class for {form.architecture}; write it for saelens")
    packed = io.BytesIO()  # torch reports a full disk as an internal error; Path says what it is
    torch.save({key: value.detach().contiguous() for key, value in state.items()}, packed)
    (folder / "ae.pt").write_bytes(packed.getbuffer())
    d_sae, d_in = t["W_dec"].shape
    trainer = {"dict_class": name, "activation_dim": d_in, "dict_size": d_sae, "lm_name": metadata.get("model_name")}
    trainer |= {"k": form.config.get("k"), "layer": layer_of(metadata.get("hook_name") or "")}
    _json({"trainer": trainer, "buffer": {"ctx_len": metadata.get("context_size")}}, folder / "config.json")


WRITERS: dict[str, Callable[[InferenceForm, Path, dict[str, Any]], None]] = {
    "saelens": _saelens,
    "sparsify": _sparsify,
    "dictionary-learning": _dictionary_learning,
}


def _subtracting(form: InferenceForm) -> Tensor:
    """The encoder bias for a tool that always subtracts ``b_dec``."""
    t = form.tensors
    return t["b_enc"] if form.config["apply_b_dec_to_input"] else t["b_enc"] + t["b_dec"] @ t["W_enc"]


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_plain({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, path)


def _json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
