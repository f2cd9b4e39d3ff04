"""Write an SAE for another tool, or as a run folder, and check that the written SAE computes the same."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.errors import UserError, near_matches
from saelab.files import new_folder
from saelab.interop.detection import read
from saelab.interop.format import Writer
from saelab.interop.formats import FORMATS
from saelab.layout import METRICS, RUN
from saelab.sae import SAE, LinearSAE
from saelab.sae.inference import TWO_SIDED, InferenceForm, doubled
from saelab.sae.normalised import Normalised
from saelab.sae.weights import load_sae, save
from saelab.sparse import SparseCode

SIGNED = {"abstopk", TWO_SIDED}
# Two float32 evaluations of one formula: dot products of length d_in and sums of k terms, with near-ties gap-checked.
TOLERANCE = 1e-4
PER_TOKEN = ("layer_norm", "constant_norm_rescale")  # normalisations that SAELens knows
SET = "config.yaml"  # of a set of circuit-tracer's
CURVE_LINES = 256  # lines of the training curve that are copied; a chart cannot show more


class Proof(NamedTuple):
    """Largest differences on a probe batch, relative to the largest activation value, and to the data's norm."""

    encode: float
    decode: float


def writers() -> dict[str, Writer]:
    """The formats that :func:`export` can write, by the name it takes: that of the format with hyphens."""
    return {name.replace("_", "-"): form.write for name, form in FORMATS.items() if form.write is not None}


def export(
    sae: SAE, folder: Path | str, to: str, metadata: Mapping[str, Any] | None = None, probe: Tensor | None = None
) -> Proof:
    """Write ``sae`` to a new ``folder`` in the format ``to``: saelens, sparsify or dictionary-learning.

    Signed SAEs become the equivalent unsigned dictionary of twice the width where the format knows no sign. The files
    are read back, both SAEs run on ``probe [n, d_in]`` (by default 256 random activations), and nothing is kept if they
    differ by more than ``TOLERANCE``.
    """
    known = writers()
    if to not in known:
        raise UserError(f"unknown format {to!r}: {near_matches(to, known)}")
    form = _form(sae, to)
    if form is None:
        raise UserError(f"a {sae.variant} SAE {sae.why_no_form()}, which has no counterpart in {to}")
    if form.d_out is not None and not FORMATS[to.replace("-", "_")].holds_targets:
        able = ", ".join(name.replace("_", "-") for name, other in FORMATS.items() if other.holds_targets)
        raise UserError(f"{to} has no place for a transcoder; {able} have")
    if form.architecture in SIGNED and not (to == "saelens" and form.in_saelens):
        form = doubled(form)
    with new_folder(Path(folder)) as temporary:
        known[to](form, temporary, dict(metadata or {}))
        proof = prove(sae, read(temporary, is_sae=True).to_sae(), random_probe(sae) if probe is None else probe)
        _check(proof, f"the {to} export")
    return proof


def _form(sae: SAE, to: str) -> InferenceForm | None:
    """The form of an SAE; of one that reads normalised activations, in SAELens' format, that of the SAE inside."""
    if to != "saelens" or not isinstance(sae, Normalised) or sae.normalize not in PER_TOKEN:
        return sae.inference_form()
    inner = sae.inner.inference_form()
    if inner is None or not inner.in_saelens:
        return None
    return replace(inner, config={**inner.config, "normalize_activations": sae.normalize})


def add_layer(sae: SAE, folder: Path | str, metadata: Mapping[str, Any]) -> Proof:
    """:func:`export` one more layer into a ``folder`` that holds a set of circuit-tracer's transcoders.

    UserError where it has that layer already, or where its ``config.yaml`` says another model or other hook points.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        proof = export(sae, Path(room) / "new", "circuit-tracer", metadata)
        (file,) = (Path(room) / "new").glob("layer_*.safetensors")
        settings = [(place / SET).read_text(encoding="utf-8") for place in (folder, Path(room) / "new")]
        if settings[0] != settings[1]:
            raise UserError(f"{folder / SET} is of another model or other hook points; name a new folder")
        if (folder / file.name).exists():
            raise UserError(f"{folder} has {file.name} already; remove it first, or name a new folder")
        file.rename(folder / file.name)
    return proof


def resave(
    sae: SAE,
    source: Path | str,
    folder: Path | str,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Proof:
    """Write ``sae``, loaded from ``source``, to the new run folder ``folder`` with its matrices in ``dtype``.

    The file, read back, is compared with the SAE whose matrices were rounded in memory, so that only rounding may
    change it. Nothing is kept if they differ by more than ``TOLERANCE``.
    """
    with new_folder(Path(folder)) as temporary:
        save(sae, temporary, metadata, dtype)
        proof = prove(rounded(sae, dtype), load_sae(temporary), random_probe(sae))
        _check(proof, "the copy")
        _copy_training_record(Path(source), temporary)
    return proof


def _check(proof: Proof, what: str) -> None:
    if max(proof) > TOLERANCE:
        raise UserError(
            f"{what} differs from the SAE by {proof.encode:.1e} (encode) and {proof.decode:.1e} (decode), "
            f"more than {TOLERANCE:.0e}; nothing was written"
        )


@torch.no_grad()
def prove(ours: SAE, theirs: SAE, x: Tensor) -> Proof:
    """How far two SAEs are apart on ``x [n, d_in]``; the second may be the doubled form of the first.

    Where two latents tie for the last place of a budget, or a latent lies on its threshold, rounding decides which of
    two right codes comes out: see :func:`near_ties`. Decoders are compared on one code there.
    """
    with ours.evaluating(), theirs.evaluating():
        a, b = ours.encode(x), theirs.encode(x)
    left, right = a.dense(), b.dense()
    if theirs.d_sae == 2 * ours.d_sae:
        right = right[:, : ours.d_sae] - right[:, ours.d_sae :]
    top = left.abs().max().clamp_min(torch.finfo(left.dtype).tiny)
    ties = near_ties(left, right, ours.inference_threshold(), TOLERANCE * top)
    if ties.any():
        a = SparseCode.from_dense(torch.where(ties.any(dim=1, keepdim=True), right, left))
    encode = (left - right).abs().masked_fill(ties, 0).max() / top
    recon, other = ours.reconstruct(x, a), theirs.reconstruct(x, b)
    decode = (recon - other).norm(dim=1).max() / (recon if ours.transcodes else x).norm(dim=1).max()
    return Proof(encode.item(), decode.item())


def near_ties(left: Tensor, right: Tensor, threshold: Tensor | None, gap: Tensor) -> Tensor:
    """Where one of two codes ``[n, d_sae]`` has a latent that the other lacks only because of a near-tie.

    With a threshold: the value is within ``gap`` of it. With a budget: both rows hold equally many latents, and the
    value is within ``gap`` of the smallest magnitude of either.
    """
    size, differ = torch.maximum(left.abs(), right.abs()), (left != 0) != (right != 0)
    if threshold is not None:
        return differ & ((size - threshold).abs() <= gap)
    alike = (left != 0).sum(dim=1, keepdim=True) == (right != 0).sum(dim=1, keepdim=True)
    for code in (left, right):
        smallest = code.abs().masked_fill(code == 0, torch.inf).amin(dim=1, keepdim=True)
        alike = alike & ((size - smallest).abs() <= gap)
    return differ & alike


def random_probe(sae: SAE) -> Tensor:
    """Random activations that use the dictionary: the offset plus a few rows with random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(256, sae.d_sae, generator=generator)
    weights *= torch.rand(256, sae.d_sae, generator=generator) < min(1.0, 16 / sae.d_sae)
    if isinstance(sae, LinearSAE) and sae.transcodes:  # what it reads lies along its encoder
        return (weights @ sae.W_enc.T.float()).detach()
    scale = sae.b_dec.norm().clamp_min(1.0)
    return (sae.b_dec + scale * weights @ sae.W_dec.float()).detach()


def _copy_training_record(source: Path, folder: Path) -> None:
    """Copy what stays true of a copy: the settings of the training, and its curve.

    Metrics and the feature index do not: rounding changes them a little, so they are measured again on the copy.
    """
    if (source / RUN).is_file():
        shutil.copyfile(source / RUN, folder / RUN)
    if (source / METRICS).is_file():
        lines = (source / METRICS).read_text(encoding="utf-8").splitlines(True)
        (folder / METRICS).write_text("".join(thinned(lines)), encoding="utf-8")


def thinned(lines: Sequence[str]) -> list[str]:
    """At most ``CURVE_LINES`` of the lines, evenly, with the first and the last."""
    n = min(len(lines), CURVE_LINES)
    return [lines[i * (len(lines) - 1) // max(n - 1, 1)] for i in range(n)]


def rounded(sae: SAE, dtype: torch.dtype) -> SAE:
    """A twin of ``sae`` whose matrices hold only values of ``dtype``, still computing in their own."""
    twin = copy.deepcopy(sae)
    state = {name: value.to(dtype) if value.ndim == 2 else value for name, value in sae.state_dict().items()}
    twin.load_state_dict(state)
    return twin
