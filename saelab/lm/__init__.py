"""The gateway to language models: loading, hook points, fingerprints and unembeddings."""

from saelab.lm.fingerprint import weights_fingerprint
from saelab.lm.hooks import HookSite, find_hook
from saelab.lm.loading import load_hf_model, load_model, model_name
from saelab.lm.sites import Site, locate
from saelab.lm.smollm2 import smollm2_folder
from saelab.lm.unembed import Unembedding, unembedding

__all__ = [
    "HookSite",
    "Site",
    "Unembedding",
    "find_hook",
    "load_hf_model",
    "load_model",
    "locate",
    "model_name",
    "smollm2_folder",
    "unembedding",
    "weights_fingerprint",
]
