"""SAEs of other tools: read them, and write saelab's in their formats, with a numerical check."""

from saelab.interop.conversion import Proof, export, prove, resave, writers
from saelab.interop.detection import detect, from_pretrained, load, read
from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register
from saelab.interop.formats import FORMATS

__all__ = [
    "FORMATS",
    "Foreign",
    "Format",
    "Proof",
    "detect",
    "export",
    "from_pretrained",
    "load",
    "prove",
    "read",
    "register",
    "resave",
    "writers",
]
