"""Harvesting: text through a language model into activation caches, one per hook point."""

from saelab.harvesting.again import harvest_again
from saelab.harvesting.config import HarvestConfig
from saelab.harvesting.pipeline import harvest, harvest_many
from saelab.harvesting.shards import Share

__all__ = ["HarvestConfig", "Share", "harvest", "harvest_again", "harvest_many"]
