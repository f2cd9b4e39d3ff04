"""Bytes that the processes of torchrun tell one another, besides the tensors of training."""

from __future__ import annotations

import torch
import torch.distributed as dist

from saelab.distributed.failures import naming_lost


def exchange_bytes(data: bytes) -> list[bytes]:
    """The ``data`` of every process, in the order of their ranks. All processes must call it.

    Raises LostProcess where another one has ended or does not answer.
    """
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with naming_lost():
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        if longest == 0:
            return [b""] * len(sizes)
        own = torch.zeros(longest, dtype=torch.uint8)
        if data:
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(found, own)
    return [part[: int(size)].numpy().tobytes() for part, size in zip(found, sizes)]
