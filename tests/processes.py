"""Several processes of one test: forks of one that has imported the package, for which each other one takes seconds."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch.multiprocessing

PRELOADED = [
    "saelab.cli",
    "saelab.harvesting",
    "saelab.training",
    "transformer_lens.model_bridge",
    "transformers.models.llama.modeling_llama",
    "tests.planted",
    "tests.tiny_lm",
]


def started(rank: int, function: Callable[..., None], environment: dict[str, str], *args: Any) -> None:
    os.environ.update(environment)  # the first process has that of the moment when it was started
    torch.set_num_threads(1)
    function(rank, *args)


def run_processes(function: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
    """Call ``function(rank, *args)`` in so many processes; raises as ``torch.multiprocessing.spawn`` does."""
    with pytest.MonkeyPatch.context() as patch:
        # A test of the app in the same process leaves the app as __main__, which new processes would run again.
        patch.setitem(sys.modules, "__main__", ModuleType("__main__"))
        mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
        arguments = (function, dict(os.environ), *args)
        torch.multiprocessing.start_processes(started, arguments, nprocs=count, start_method="forkserver")
