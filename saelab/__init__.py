"""Train, explore and steer with sparse autoencoders.

The names below are loaded on first use, so ``import saelab`` is fast.
"""

from __future__ import annotations

import importlib
from typing import Any

from saelab._version import __version__

# public name -> module that defines it
_EXPORTS = {
    "ActivationCache": "saelab.data.cache",
    "import_activations": "saelab.data.cache.importing",
    "SparseCode": "saelab.sparse",
    "SAE": "saelab.sae",
    "VARIANTS": "saelab.sae",
    "build": "saelab.sae",
    "save": "saelab.sae.weights",
    "train": "saelab.training",
    "train_steps": "saelab.training",
    "fit_steps": "saelab.training",
    "TrainConfig": "saelab.training",
    "TrainState": "saelab.training",
    "load_model": "saelab.lm",
    "harvest": "saelab.harvesting",
    "harvest_many": "saelab.harvesting",
    "HarvestConfig": "saelab.harvesting",
    "roll": "saelab.harvesting.rolling",
    "RollingConfig": "saelab.harvesting.rolling",
    "evaluate": "saelab.evaluation",
    "attribute": "saelab.attribution",
    "AttributionGraph": "saelab.attribution",
    "FeatureIndex": "saelab.features",
    "build_index": "saelab.features",
    "load": "saelab.interop",
    "inspect": "saelab.runs.inspection",
    "Run": "saelab.runs",
    "export": "saelab.interop",
    "from_pretrained": "saelab.interop",
    "push_to_hub": "saelab.runs.publishing",
    "UserError": "saelab.errors",
}

__all__ = ["__version__", *_EXPORTS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'saelab' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
