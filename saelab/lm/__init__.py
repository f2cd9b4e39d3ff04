"""Language models: loading, hook points, fingerprints and unembeddings."""

from saelab.lm.fingerprint import weights_fingerprint
from saelab.lm.loading import load_hf_model, load_model, model_name
from saelab.lm.sites import Site, check_replaceable, locate
from saelab.lm.smollm2 import smollm2_folder
from saelab.lm.unembed import Unembedding, unembedding

__all__ = [
    "Site",
    "Unembedding",
    "check_replaceable",
    "load_hf_model",
    "load_model",
    "locate",
    "model_name",
    "smollm2_folder",
    "unembedding",
    "weights_fingerprint",
]
