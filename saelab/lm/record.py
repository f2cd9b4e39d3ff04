"""Which language model activations come from, as files record it, and whether a loaded model is that one."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saelab.devices import DTYPES
from saelab.errors import UserError
from saelab.lm.fingerprint import dtype_name, model_dtype, weights_fingerprint, weights_fingerprints
from saelab.lm.loading import load_hf_model, load_model, model_name

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_NARROWER = ("float16", "bfloat16")


@dataclass(frozen=True)
class ModelRecord:
    """The language model that activations come from, as caches, runs and indexes record it; all optional.

    ``rounded`` holds the fingerprint that the same weights have in each narrower dtype, so that a model loaded in
    bfloat16 is recognised as the one that was harvested in float32.
    """

    name: str = ""
    revision: str = ""
    dtype: str = ""  # the model ran in it
    fingerprint: str = ""
    rounded: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: TransformerBridge | nn.Module, name: str = "", revision: str = "") -> ModelRecord:
        """The record of a loaded model."""
        own, *narrower = weights_fingerprints(model, [None, *(DTYPES[dtype] for dtype in _NARROWER)])
        return cls(name, revision, dtype_name(model_dtype(model)), own, dict(zip(_NARROWER, narrower)))

    @classmethod
    def from_json(cls, content: Any) -> ModelRecord:
        """The record in a file; what is missing or of another type is unknown."""
        known = content if isinstance(content, dict) else {}
        texts = {name: str(known.get(name) or "") for name in ("name", "revision", "dtype", "fingerprint")}
        rounded = known.get("rounded")
        return cls(**texts, rounded=dict(rounded) if isinstance(rounded, dict) else {})

    @classmethod
    def from_manifest(cls, manifest: Any) -> ModelRecord:
        """The record in the manifest of an activation cache."""
        fingerprint, rounded = manifest.weights_fingerprint, dict(manifest.weights_rounded)
        return cls(manifest.model, manifest.revision, manifest.model_dtype, fingerprint, rounded)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)

    def has_weights_of(self, model: TransformerBridge | nn.Module) -> bool:
        """Whether the weights of ``model`` are the recorded ones, or one of the two is the other rounded.

        True where no weights were recorded.
        """
        if not self.fingerprint:
            return True
        found, *narrower = weights_fingerprints(model, [None, *(DTYPES[name] for name in _NARROWER)])
        return found == self.fingerprint or found in self.rounded.values() or self.fingerprint in narrower


def check_weights(model: TransformerBridge | nn.Module, record: ModelRecord, what: str, any_weights: bool) -> None:
    """Refuse a model whose weights are not those of ``record``; ``what`` names what was made from them."""
    if any_weights or record.has_weights_of(model):
        return
    raise UserError(
        f"{what} was made with other weights than those of the model given: {differences(model, record)}; give that "
        "model (--model, --revision), or --any-weights to use this one all the same"
    )


def differences(model: TransformerBridge | nn.Module, record: ModelRecord) -> str:
    """In what ``model`` differs from the recorded one: weights, revision, dtype, or else edits and hooks."""
    name, revision = model_name(model)
    dtype, found = dtype_name(model_dtype(model)), []
    if not record.has_weights_of(model):
        found.append(f"weights ({weights_fingerprint(model)}, recorded {record.fingerprint})")
    if record.revision and revision and record.revision != revision:
        found.append(f"revision ({revision}, recorded {record.revision})")
    if record.dtype and record.dtype != dtype:
        found.append(f"dtype ({dtype}, recorded {record.dtype}; --model-dtype sets it)")
    if record.name and name != record.name:
        found.append(f"name ({name or 'none'}, recorded {record.name})")
    if found:
        return ", ".join(found)
    return "the weights agree, so hooks or other edits were set on one of the two models"


def load_settings(record: ModelRecord, name: str, dtype: str | None, revision: str | None) -> tuple[str, str | None]:
    """The precision and the revision to load model ``name`` with: those given, else the recorded ones."""
    if revision is None and name == record.name and re.fullmatch("[0-9a-f]{40}", record.revision):
        revision = record.revision  # of a hub id; a branch may have moved on since
    return dtype or (record.dtype if record.dtype in DTYPES else "float32"), revision


def load_recorded(
    record: ModelRecord,
    what: str,
    *,
    name: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    device_map: str | None = None,
    tensor_parallel: bool = False,
    any_weights: bool = False,
    plain: bool = False,
) -> Any:
    """Load the recorded model, in the recorded precision and revision unless others are given, and check its weights.

    ``what`` names what was made from the model, for the message. ``plain`` asks for the model without a bridge.
    UserError where neither the record nor ``name`` says which model, and where the weights are others.
    """
    wanted = name or record.name
    if not wanted:
        raise UserError(f"{what} does not name its language model; give one with --model")
    dtype, revision = load_settings(record, wanted, dtype, revision)
    load = load_hf_model if plain else load_model
    where: dict[str, Any] = {"device": device, "device_map": device_map, "tensor_parallel": tensor_parallel}
    model = load(wanted, dtype=dtype, revision=revision, **where)
    check_weights(model, record, what, any_weights)
    return model
