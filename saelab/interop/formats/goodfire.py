"""Goodfire's SAEs: one torch file each."""

from __future__ import annotations

from pathlib import Path

from saelab.interop import kind
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.reading import read_linear, read_tensors, tensor_names


def sniff(path: Path) -> bool:
    """A torch file with ``encoder_linear.weight``."""
    return path.is_file() and "encoder_linear.weight" in tensor_names(path)


def read(path: Path) -> Foreign:
    """Goodfire: ``encoder_linear.*``, ``decoder_linear.*``, ReLU, nothing subtracted."""
    kind.check_names(path)
    raw = {str(name).replace("_linear.", "."): value for name, value in read_tensors(path).items()}
    return Foreign("goodfire", "relu", subtracts_b_dec=False, **read_linear(raw, path))


register(Format("goodfire", ("*.pt", "*.pth"), sniff, read, by_content=True))
