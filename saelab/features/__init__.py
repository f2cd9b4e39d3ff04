"""The feature index: every latent of an SAE described from one pass over a cache of activations."""

from saelab.features.build.builder import build_index
from saelab.features.build.config import IndexConfig
from saelab.features.build.logit_lens import LogitLens
from saelab.features.index import FeatureIndex
from saelab.features.schema import Example

__all__ = ["Example", "FeatureIndex", "IndexConfig", "LogitLens", "build_index"]
