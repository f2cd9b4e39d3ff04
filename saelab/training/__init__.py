"""Training: one flat loop as a generator, its configuration, its resumable state, and the run folder it fills."""

from saelab.training.config import TrainConfig, check, n_steps
from saelab.training.fitting import finished, fit, read_run
from saelab.training.loop import adopt, batches, centre_of, finish, start, train
from saelab.training.state import TrainState
from saelab.training.step import Diverged, StepMetrics, step

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
