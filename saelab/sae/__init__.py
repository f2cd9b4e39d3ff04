"""The variants. A new one is a file in this folder and its name in the import below."""

from saelab.sae import abs_topk, batch_topk, topk  # noqa: F401
from saelab.sae.base import SAE, VARIANTS, LinearSAE, build

__all__ = ["SAE", "VARIANTS", "LinearSAE", "build"]
