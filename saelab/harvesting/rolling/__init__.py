"""Rolling caches: train on more activations than the disk holds, by harvesting while the training reads.

The first documents of the text are kept: a sample that the statistics, the initialisation and the thresholds of every
SAE are taken from, and the held-out documents. Together they are an ordinary cache. The documents after them go
through segments: folders that are written, shuffled, read once and removed.
"""

from saelab.harvesting.rolling.cache import RollingCache, roll
from saelab.harvesting.rolling.config import RollingConfig

__all__ = ["RollingCache", "RollingConfig", "roll"]
