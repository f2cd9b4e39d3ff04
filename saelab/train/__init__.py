"""Training: one flat loop as a generator, its configuration, its resumable state, and the run folder it fills."""

from saelab.train.config import TrainConfig, check, n_steps
from saelab.train.loop import adopt, batches, centre_of, finish, start, train
from saelab.train.run import finished, fit, read_run
from saelab.train.state import TrainState
from saelab.train.stepping import Diverged, StepMetrics, step

__all__ = [
    "Diverged",
    "StepMetrics",
    "TrainConfig",
    "TrainState",
    "adopt",
    "batches",
    "centre_of",
    "check",
    "finish",
    "finished",
    "fit",
    "n_steps",
    "read_run",
    "start",
    "step",
    "train",
]
