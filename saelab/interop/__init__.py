"""SAEs of other tools: read them, and write saelab's in their formats, with a numerical check."""

from saelab.interop.detection import FORMATS, detect, load, read
from saelab.interop.exporting import WRITERS, Proof, export, prove
from saelab.interop.foreign import Foreign
from saelab.interop.inspection import inspect

__all__ = ["FORMATS", "WRITERS", "Foreign", "Proof", "detect", "export", "inspect", "load", "prove", "read"]
