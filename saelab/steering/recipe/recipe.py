"""``Recipe``: interventions saved as a folder that can be shared.

``recipe.json`` holds the interventions, the model and the origin of each part; ``vectors.safetensors`` holds the
directions, ``sae_N/`` the SAEs that latent interventions need. Every tensor is covered by a hash, nothing is pickled,
and a recipe made for another model is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saelab._version import __version__
from saelab.errors import UserError, damaged
from saelab.files import new_folder, write_json, write_tensors
from saelab.layout import RECIPE, VECTORS
from saelab.runs import Run
from saelab.sae.weights import load_sae, save, tensors_hash
from saelab.steering.attachment import attach
from saelab.steering.conditions import LatentFires, ProbeFires
from saelab.steering.interventions import OPERATIONS, Intervention, LatentIntervention
from saelab.steering.positions import Positions
from saelab.steering.recipe.model import ModelIdentity
from saelab.steering.vectors import SteeringVector

# Version 2 has conditions and schedules, which a reader of version 1 would pass over; others are still written as 1.
FORMAT, VERSIONS = "saelab-recipe", (1, 2)
AGAIN = "get the recipe again"


@dataclass(frozen=True, eq=False)
class Recipe:
    """Interventions and the model they were made for."""

    interventions: Sequence[Intervention]
    model: ModelIdentity
    name: str = ""
    description: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)  # free: prompts, calibration, measured effects

    @classmethod
    def of(cls, model: nn.Module, interventions: Intervention | Sequence[Intervention], **about: Any) -> Recipe:
        """A recipe for ``model``."""
        interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
        return cls(interventions, ModelIdentity.of(model), **about)

    @contextmanager
    def attach(self, model: nn.Module, any_weights: bool = False) -> Iterator[Positions]:
        """Steer ``model``, a bridge or a plain Hugging Face model, while the ``with`` block lasts.

        Raises UserError if the recipe was made for another model. With ``any_weights=True`` it is also applied to a
        fine-tuned, quantised or rounded model of the same architecture and sizes.
        """
        self.model.check(model, any_weights)
        with attach(model, self.interventions) as positions:
            yield positions

    def settings(self) -> list[dict[str, Any]]:
        """The settings of every intervention, without tensors, for reading before the recipe is applied."""
        return [intervention.settings() for intervention in self.interventions]

    def save(self, folder: Path | str, overwrite: bool = False) -> Path:
        """Write the recipe; the folder appears complete or not at all."""
        folder = Path(folder)
        check_free(folder, overwrite)
        with new_folder(folder, overwrite=overwrite) as partial:
            self._write(partial)
        return folder

    def _write(self, folder: Path) -> None:
        vectors: dict[str, Tensor] = {}
        saes: dict[int, str] = {}
        entries = []
        for intervention in self.interventions:
            _check_savable(intervention)
            entry = intervention.saved_settings()
            if isinstance(intervention, LatentIntervention):
                entry |= _sae_entry(intervention.run, intervention.hook_name, saes, folder)
            else:
                entry["vectors"] = [_vector_entry(v, vectors) for v in intervention.directions]
            if isinstance(intervention.when, LatentFires):
                entry["when"] |= _sae_entry(intervention.when.run, intervention.when.hook_name, saes, folder)
            elif isinstance(intervention.when, ProbeFires):
                entry["when"]["vectors"] = [_vector_entry(intervention.when.vector, vectors)]
            entries.append(entry)
        write_tensors(folder / VECTORS, vectors)
        content = {
            "format": FORMAT,
            "version": 2 if any("when" in entry or "schedule" in entry for entry in entries) else 1,
            "saelab_version": __version__,
            "name": self.name,
            "description": self.description,
            "model": asdict(self.model),
            "interventions": entries,
            "vectors_sha256": tensors_hash(vectors),
            "provenance": self.provenance,
        }
        write_json(folder / RECIPE, content)

    @classmethod
    def load(cls, folder: Path | str) -> Recipe:
        """Read a recipe and check its hashes."""
        folder = Path(folder)
        content = _read(folder)
        with damaged(folder / VECTORS, AGAIN, SafetensorError, OSError):
            vectors = load_file(folder / VECTORS)
        if tensors_hash(vectors) != content.get("vectors_sha256"):
            raise UserError(f"{folder / VECTORS} does not match the hash in {RECIPE}; {AGAIN}")
        runs: dict[tuple[str, str], Run] = {}
        with damaged(folder / RECIPE, AGAIN):
            interventions = [_intervention(entry, folder, vectors, runs) for entry in content["interventions"]]
            about = {name: content[name] for name in ("name", "description", "provenance")}
            return cls(interventions, ModelIdentity(**content["model"]), **about)


def check_free(folder: Path, overwrite: bool = False) -> None:
    """UserError unless a recipe may be written into ``folder``."""
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists; replace it with overwrite (--overwrite), or give another name")
    if folder.exists() and not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is not a recipe and will not be replaced; give another name")
    check_parent(folder)


def check_parent(path: Path) -> None:
    """Raise UserError if the nearest existing parent of ``path`` is not a folder or cannot be written."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{path} cannot be written: {above} is {'read-only' if above.is_dir() else 'a file'}")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE
    if not path.is_file():
        raise UserError(f"{folder} is not a recipe: it has no {RECIPE}; name the folder of a saved one")
    with damaged(path, AGAIN):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("it holds no JSON object")
    if content.get("format") != FORMAT or content.get("version") not in VERSIONS:
        raise UserError(
            f"{path} has format {content.get('format')} version {content.get('version')}; this saelab reads "
            f"{FORMAT} versions {VERSIONS[0]} and {VERSIONS[-1]}; save it again or update saelab"
        )
    return content


def _check_savable(intervention: Intervention) -> None:
    if callable(intervention.where):
        raise UserError("a token predicate cannot be written to a file; use all, prompt, generated or positions")
    if intervention.when is not None and not isinstance(intervention.when, LatentFires | ProbeFires):
        raise UserError(
            f"the condition {type(intervention.when).__name__} cannot be written to a recipe; use LatentFires or "
            "ProbeFires"
        )
    name = type(intervention).__name__
    if not intervention.operation:
        raise UserError(
            f"{name} cannot be written to a recipe, which finds operations by name; declare it with "
            f'class {name}(..., operation="{name.lower()}")'
        )


def _sae_entry(run: Run, hook_name: str, saes: dict[int, str], folder: Path) -> dict[str, Any]:
    name = saes.setdefault(id(run.sae), f"sae_{len(saes)}")
    if not (folder / name).exists():
        save(run.sae, folder / name, _places(run) or {"hook_name": hook_name})
    places = {"sae_places": _places(run)} if run.sae.transcodes else {}
    return {"sae": name, "sae_sha256": run.fingerprint, "source": _shareable(run.provenance()), **places}


def _places(run: Run) -> dict[str, str]:
    """Where a transcoder reads and writes; nothing for an SAE that does both in one place, its intervention's."""
    return {"hook_name": run.hook_name, "hook_name_out": run.hook_name_out} if run.sae.transcodes else {}


def _vector_entry(vector: SteeringVector, vectors: dict[str, Tensor]) -> dict[str, Any]:
    name = f"vector_{len(vectors)}"
    vectors[name] = vector.direction.clone()  # two steps may share a vector; a file may not
    known = {
        key: getattr(vector, key) for key in ("norm", "hook_name", "model", "max_activation", "rms_norm", "origin")
    }
    return {"tensor": name, **_shareable(known)}


def _shareable(value: Any) -> Any:
    """Provenance without paths of this machine: of a run's folder the name, beside its hash."""
    if isinstance(value, dict):
        return {
            key: Path(inner).name if key == "run" and isinstance(inner, str) else _shareable(inner)
            for key, inner in value.items()
        }
    return [_shareable(inner) for inner in value] if isinstance(value, list | tuple) else value


def _intervention(
    entry: dict[str, Any], folder: Path, vectors: dict[str, Tensor], runs: dict[tuple[str, str], Run]
) -> Intervention:
    operation = next((cls for cls in OPERATIONS.values() if cls.__name__ == entry["op"]), None)
    if operation is None:
        raise UserError(
            f"{folder / RECIPE} uses the operation {entry['op']!r}, which is not registered here; update saelab, or "
            "import the module that defines it"
        )
    if "vectors" in entry:
        found = operation.from_settings(entry, vectors=[_vector(v, vectors) for v in entry["vectors"]])
    else:
        found = operation.from_settings(entry, run=_run(entry, folder, runs))
    when = entry.get("when")
    if when is None:
        return found
    if when["kind"] == "probe":
        return replace(found, when=ProbeFires(_vector(when["vectors"][0], vectors), when["above"]))
    return replace(found, when=LatentFires(_run(when, folder, runs), when["latent"], when["above"], when["pole"]))


def _vector(entry: dict[str, Any], vectors: dict[str, Tensor]) -> SteeringVector:
    return SteeringVector(vectors[entry["tensor"]], **{key: value for key, value in entry.items() if key != "tensor"})


def _run(entry: dict[str, Any], folder: Path, runs: dict[tuple[str, str], Run]) -> Run:
    name, hook_name = entry["sae"], entry["hook_name"]
    if (name, hook_name) not in runs:
        places = entry.get("sae_places") or {"hook_name": hook_name}
        found = runs[name, hook_name] = Run(load_sae(folder / name), **places)
        if found.fingerprint != entry["sae_sha256"]:
            raise UserError(f"{folder / name} does not match the hash in {RECIPE}; {AGAIN}")
    return runs[name, hook_name]
