"""What steering needs of a trained SAE: its weights, its hook point, and the sizes that strengths are multiples of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from saelab.errors import UserError
from saelab.interop.detection import load_with_metadata
from saelab.layout import FEATURES, INDEX
from saelab.sae import SAE


@dataclass(frozen=True, eq=False)
class Run:
    """An SAE and what is known of it.

    ``folder`` is the file or folder it was read from, None for an SAE that was never saved.
    """

    sae: SAE
    hook_name: str
    model: str | None = None
    folder: Path | None = None
    rms_norm: float | None = None  # of the activations it was trained on
    hf_hook_name: str | None = None

    @classmethod
    def open(cls, path: Path | str, hook_name: str = "") -> Run:
        """Load a run folder, or an SAE of another tool in any form that :func:`saelab.load` reads.

        ``hook_name`` is needed where the files do not say to which point of the model the SAE belongs, and wins where
        they do. An SAE of another tool knows neither the norm of its activations nor its latents' maxima, unless it
        was indexed: strengths are then lengths in units of the activations.
        """
        sae, metadata, path, _ = load_with_metadata(path)
        hook_name = hook_name or metadata.get("hook_name") or metadata.get("hf_hook_name") or ""
        if not hook_name:
            raise UserError(f"{path} does not record where in the model it belongs; give hook_name (--hook)")
        return cls(
            sae, hook_name, metadata.get("model_name"), path, metadata.get("rms_norm"), metadata.get("hf_hook_name")
        )

    @cached_property
    def index(self) -> Any | None:
        """The feature index of the run folder, or None where there is none."""
        if self.folder is None or not (self.folder / INDEX / FEATURES).is_file():
            return None
        from saelab.features import FeatureIndex

        return FeatureIndex(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the SAE's tensors."""
        return tensors_hash(self.sae.state_dict())

    def check_latent(self, latent: int) -> int:
        """``latent`` if the dictionary has it."""
        if not 0 <= latent < self.sae.d_sae:
            raise UserError(f"latent {latent} does not exist: the SAE has latents 0 to {self.sae.d_sae - 1}")
        return latent

    def max_activation(self, latent: int, pole: int = 1) -> float | None:
        """The largest magnitude the latent reached on this pole in the index; None where it is not known.

        It is not known without an index, and on a pole on which the latent never fired; ``why_no_max`` says which.
        """
        self.check_latent(latent)
        if self.index is None or pole not in self.index.poles:
            return None
        return float(self.index.max_activation(latent, pole)) or None

    def why_no_max(self, latent: int, pole: int) -> str:
        """Why a strength in multiples of the latent's maximum has no meaning, with the remedy."""
        if self.index is not None:
            return f"latent {latent} never fires on its {'+' if pole > 0 else '-'} pole in the feature index"
        if self.folder is None:
            return "the SAE has no feature index; set it with with_units(max_activation=...)"
        return f"{self.folder} has no feature index; build it with `saelab index {self.folder} --cache CACHE`"

    def provenance(self) -> dict[str, Any]:
        """What a vector or a recipe records of the SAE it came from."""
        return {"run": None if self.folder is None else str(self.folder), "sae_sha256": self.fingerprint}


def as_run(run: Run | SAE | Path | str, hook_name: str = "") -> Run:
    """A :class:`Run` from a run folder, an SAE with its hook name, or a run itself."""
    if isinstance(run, Run):
        return run
    if isinstance(run, SAE):
        if not hook_name:
            raise UserError(
                "an SAE that was not loaded from a run folder needs hook_name, e.g. blocks.9.hook_resid_post"
            )
        return Run(run.eval(), hook_name)
    return Run.open(run, hook_name)


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
