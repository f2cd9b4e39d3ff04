"""The steering operations, one module each; importing this package registers them all.

Add, ProjectOut and Cap act along vectors; Scale, Clamp, MinClamp and Ablate on one latent.
"""

import importlib
import pkgutil

from saelab.steering.operations.ablate import Ablate
from saelab.steering.operations.add import Add
from saelab.steering.operations.cap import Cap
from saelab.steering.operations.clamp import Clamp, MinClamp
from saelab.steering.operations.project_out import ProjectOut
from saelab.steering.operations.scale import Scale

__all__ = ["Ablate", "Add", "Cap", "Clamp", "MinClamp", "ProjectOut", "Scale"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
