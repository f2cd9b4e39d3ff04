"""qresearch's SAEs: one torch file each, called ``MODEL-SAE-lLAYER.pt``."""

from __future__ import annotations

import re
from pathlib import Path

from saelab.interop import kind
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import read_linear, read_tensors, tensor_names

# The tensors are those of two linear maps, and say nothing of what is between: the name of the file must.
NAME = re.compile(r".+-SAE-l(?P<layer>\d+)\.pth?")


def sniff(path: Path) -> bool:
    """A torch file of such a name with ``encoder.*`` and ``decoder.*``."""
    return path.is_file() and NAME.fullmatch(path.name) is not None and "decoder.bias" in tensor_names(path)


def read(path: Path) -> Foreign:
    """``encoder.*``, ``decoder.*``, ReLU, nothing subtracted; it reads the residual stream behind the block."""
    kind.check_names(path)
    foreign = Foreign("qresearch", "relu", subtracts_b_dec=False, **read_linear(read_tensors(path), path))
    if match := NAME.fullmatch(path.name):
        foreign.metadata["hook_name"] = f"blocks.{match['layer']}.hook_resid_post"
        foreign.known_from["hook_name"] = "the name of the file"
    return foreign


register(Format("qresearch", ("*.pt", "*.pth"), sniff, read, by_content=True))
