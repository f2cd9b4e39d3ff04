"""overcomplete's bare state dicts: dictionaries with a linear encoder, a jump, or matching pursuit.

The file names neither the class nor k. Some follow from its tensors: ``thresholds`` means JumpReLU, no encoder means a
pursuit, ``dictionary.C`` an archetypal dictionary. The user gives the rest: ``k`` (TopK, or steps of a pursuit),
``pursuit=True``, ``threshold`` (BatchTopK keeps its running threshold outside its state).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.interop import kind
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import checked, matrix_shape, read_tensors, tensor_names

WEIGHT, BIAS = "encoder.final_block.0.weight", "encoder.final_block.0.bias"
PLAIN, ARCHETYPAL = "dictionary._weights", "dictionary.Relax"
DEEP = ("encoder.mlp_blocks", "encoder.final_block.1.", "encoder.conv", "encoder.attention", "encoder.layers")


def sniff(path: Path) -> bool:
    """A torch file with one of overcomplete's dictionaries."""
    return path.is_file() and bool({PLAIN, ARCHETYPAL} & tensor_names(path))


def read(path: Path, k: int | None = None, pursuit: bool = False, threshold: float | None = None) -> Foreign:
    """TopK, BatchTopK, Jump, plain and pursuit SAEs with a linear or no encoder; there is no offset."""
    kind.check_names(path)
    raw = read_tensors(path)
    if "Q" in raw:
        raise UserError(f"{path} is a quantised SAE (QSAE), which has no counterpart here")
    W_dec, notes = _dictionary(raw, path)
    d_sae, d_in = W_dec.shape
    if WEIGHT not in raw and not any(str(name).startswith("encoder.") for name in raw) and not pursuit:
        raise UserError(
            f"{path} has no encoder: a pursuit SAE; pass pursuit=True and k (--pursuit --k on the command line)"
        )
    if pursuit:
        if k is None:
            raise UserError(
                f"{path} does not record how many atoms its pursuit picks; pass k (--k on the command line)"
            )
        steps = {"n_steps": k, "residual_stop": 0.0, "use_b_dec": False}
        notes.append("matching pursuit is assumed; an orthogonal one (OMPSAE) would compute other codes")
        return Foreign("overcomplete", "matching_pursuit", W_dec, torch.zeros(d_in), pursuit=steps, notes=notes)
    if any(str(name).startswith(DEEP) for name in raw):
        raise UserError(
            f"{path} has a deep or normalised encoder; only overcomplete's linear encoder has a counterpart"
        )
    tensors = checked(raw, {WEIGHT: (d_sae, d_in), BIAS: (d_sae,)}, path)
    levels = _thresholds(raw, d_sae, threshold, path)
    if levels is None and k is None:
        notes.append("read as a ReLU SAE; for a TopK, pursuit or BatchTopK SAE give k, pursuit or threshold")
    return Foreign(
        format="overcomplete",
        architecture="jump_relu" if levels is not None else "relu" if k is None else "topk",
        W_enc=tensors[WEIGHT].T,
        b_enc=tensors[BIAS],
        W_dec=W_dec,
        b_dec=torch.zeros(d_in),
        k=k,
        threshold=levels,
        notes=notes,
    )


def _dictionary(raw: dict[str, Any], path: Path) -> tuple[Tensor, list[str]]:
    """The rows as the decoder uses them, and what is assumed about them."""
    notes: list[str] = []
    if PLAIN in raw:
        rows = checked(raw, {PLAIN: matrix_shape(raw, PLAIN, path)}, path)[PLAIN]
        norms = rows.norm(dim=1, keepdim=True)
        if (norms - 1).abs().max() > 0.01:
            notes.append(
                "dictionary rows are not of unit norm; overcomplete's default, L2 normalisation on use, is assumed"
            )
        rows = rows / (norms + 1e-8)
    else:
        (d_sae, d_in), n_points = matrix_shape(raw, ARCHETYPAL, path), matrix_shape(raw, "dictionary.C", path)[0]
        shapes = {ARCHETYPAL: (d_sae, d_in), "dictionary.C": (n_points, d_in), "dictionary.W": (d_sae, n_points)}
        t = checked(raw, shapes, path)
        rows = t["dictionary.W"] @ t["dictionary.C"] + t[ARCHETYPAL]
    multiplier = torch.as_tensor(raw.get("dictionary.multiplier", 0.0)).float().exp()
    if multiplier.numel() != 1 or not multiplier.isfinite().all():
        raise UserError(f"{path}: dictionary.multiplier is not one finite number")
    return multiplier * rows, notes


def _thresholds(raw: dict[str, Any], d_sae: int, threshold: float | None, path: Path) -> Tensor | None:
    """Levels above which a latent fires; overcomplete fires at the level itself too, hence one ulp below it."""
    if "thresholds" in raw:
        levels = checked(raw, {"thresholds": (d_sae,)}, path)["thresholds"].exp()
    elif threshold is None:
        return None
    else:
        levels = torch.full((d_sae,), float(threshold))
    return torch.nextafter(levels, levels.new_tensor(0.0))


OPTIONS = ("k", "pursuit", "threshold")
register(Format("overcomplete", ("*.pt", "*.pth"), sniff, read, options=OPTIONS, by_content=True))
