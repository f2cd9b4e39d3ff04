"""Training on many processes with torch.distributed: data parallel, dictionary parallel, and both together."""

from saelab.distributed.world import SINGLE, Parallel, Poll, launched, start_world

__all__ = ["SINGLE", "Parallel", "Poll", "launched", "start_world"]
