"""The activation cache: shards on disk with a manifest, read in place and shuffled while reading."""

from saelab.data.cache.manifest import Manifest, ShardInfo
from saelab.data.cache.reader import ActivationCache, Batch, Split
from saelab.data.cache.writer import CacheWriter

__all__ = ["ActivationCache", "Batch", "CacheWriter", "Manifest", "ShardInfo", "Split"]
