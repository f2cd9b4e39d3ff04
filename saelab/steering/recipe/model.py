"""The identity of the model that a recipe belongs to: its configuration and a hash of its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from saelab.errors import UserError
from saelab.lm import model_name
from saelab.lm.record import ModelRecord
from saelab.lm.sites import blocks, underlying, width


@dataclass(frozen=True)
class ModelIdentity:
    """The identity of a model, as stored in a recipe."""

    name: str | None
    architecture: str  # the Hugging Face class
    d_model: int | None
    n_layers: int
    fingerprint: str  # of the weights
    revision: str = ""
    dtype: str = ""  # the model ran in it; "" before 0.2.0
    rounded: dict[str, str] = field(default_factory=dict)  # fingerprints of the weights rounded to these dtypes

    @classmethod
    def of(cls, model: nn.Module) -> ModelIdentity:
        """The identity of a bridge or of a plain Hugging Face model; both give the same for the same weights."""
        (name, revision), found = model_name(model), ModelRecord.of(model)
        sizes = type(underlying(model)).__name__, width(model), len(blocks(model)[1])
        return cls(name or None, *sizes, found.fingerprint, revision, found.dtype, found.rounded)

    @property
    def record(self) -> ModelRecord:
        """The part that says which weights these are."""
        return ModelRecord(self.name or "", self.revision, self.dtype, self.fingerprint, self.rounded)

    def check(self, model: nn.Module, any_weights: bool = False) -> None:
        """UserError unless ``model`` is this one, or with ``any_weights`` has the same architecture and sizes."""
        other = ModelIdentity.of(model)
        for name in ("architecture", "d_model", "n_layers"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise UserError(
                    f"the recipe was made for {self.name or 'a model'} with {name} {mine}; this model has {theirs}"
                )
        if not any_weights and not self.record.has_weights_of(model):
            raise UserError(
                f"the recipe was made for other weights ({self.name or self.architecture}, {self.fingerprint}); these "
                f"are {other.name or other.architecture}, {other.fingerprint}. any_weights=True (--any-weights) "
                "applies it anyway"
            )
