"""One module per tool or collection whose SAE files saelab reads; importing this package registers them all."""

import importlib
import pkgutil

from saelab.interop.format import FORMATS

__all__ = ["FORMATS"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
