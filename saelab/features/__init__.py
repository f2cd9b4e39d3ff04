"""The feature index: every latent of an SAE described from one pass over a cache of activations."""

from saelab.features.index import FeatureIndex
from saelab.features.indexing.builder import build_index
from saelab.features.indexing.config import IndexConfig
from saelab.features.indexing.logit_lens import LogitLens
from saelab.features.schema import Example

__all__ = ["Example", "FeatureIndex", "IndexConfig", "LogitLens", "build_index"]
