"""The variants. A new one is a file in this folder: every module here is imported, and registers what it declares."""

import importlib
import pkgutil

from saelab.sae.base import SAE, VARIANTS, build
from saelab.sae.linear import LinearSAE
from saelab.sae.normalised import Normalised, restore

__all__ = ["SAE", "VARIANTS", "LinearSAE", "Normalised", "build", "restore"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
