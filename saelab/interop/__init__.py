"""At home among other tools: read anyone's SAE, write ours for them, with numerical proof."""

from saelab.interop.detection import FORMATS, detect, load, read
from saelab.interop.exporting import WRITERS, Proof, export, prove
from saelab.interop.foreign import Foreign
from saelab.interop.inspection import inspect

__all__ = ["FORMATS", "WRITERS", "Foreign", "Proof", "detect", "export", "inspect", "load", "prove", "read"]
