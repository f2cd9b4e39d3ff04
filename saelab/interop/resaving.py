"""A saelab run folder of any SAE, in 32 or 16 bits: the form in which one is kept, shipped and published."""

from __future__ import annotations

import copy as python_copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saelab.errors import UserError
from saelab.interop.exporting import TOLERANCE, Proof, prove, random_probe
from saelab.layout import METRICS, RUN
from saelab.sae import SAE
from saelab.sae.weights import load_sae, save

CURVE_LINES = 256  # of the training curve that go along; more than a chart has pixels for is of no use


def copy(
    sae: SAE,
    source: Path | str,
    folder: Path | str,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Proof:
    """Write ``sae``, loaded from ``source``, to the new run folder ``folder`` with its matrices in ``dtype``.

    The proof compares the file, read back, with the SAE whose matrices were rounded in memory: that nothing but the
    rounding happened. Nothing is kept when they differ by more than :data:`saelab.interop.exporting.TOLERANCE`.
    """
    source, folder = Path(source), Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        save(sae, temporary, metadata, dtype)
        proof = prove(rounded(sae, dtype), load_sae(temporary), random_probe(sae))
        if max(proof) > TOLERANCE:
            raise UserError(
                f"the copy differs from the SAE by {proof.encode:.1e} (encode) and {proof.decode:.1e} (decode), "
                f"more than {TOLERANCE:.0e}; nothing was written"
            )
        _companions(source, temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return proof


def _companions(source: Path, folder: Path) -> None:
    """What stays true of a copy: how it was trained, and the curve.

    Metrics and the feature index do not: rounding changes them a little, so they are measured again on the copy.
    """
    if (source / RUN).is_file():
        shutil.copyfile(source / RUN, folder / RUN)
    if (source / METRICS).is_file():
        (folder / METRICS).write_text("".join(thinned((source / METRICS).read_text().splitlines(True))))


def thinned(lines: Sequence[str]) -> list[str]:
    """At most ``CURVE_LINES`` of the lines, evenly, with the first and the last."""
    n = min(len(lines), CURVE_LINES)
    return [lines[i * (len(lines) - 1) // max(n - 1, 1)] for i in range(n)]


def rounded(sae: SAE, dtype: torch.dtype) -> SAE:
    """A twin of ``sae`` whose matrices hold only values of ``dtype``, still computing in their own."""
    twin = python_copy.deepcopy(sae)
    state = {name: value.to(dtype) if value.ndim == 2 else value for name, value in sae.state_dict().items()}
    twin.load_state_dict(state)
    return twin
