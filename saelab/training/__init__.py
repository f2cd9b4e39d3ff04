"""Training: the loop, its configuration, its resumable state, and the run folder that it writes."""

from saelab.training.config import TrainConfig, check, chosen_rate, n_steps, prepared
from saelab.training.divergence import Diverged
from saelab.training.fitting import finished, fit_steps, read_run, train
from saelab.training.loop import adopt, batches, centre_of, finalise, start, train_steps
from saelab.training.readings import StepMetrics
from saelab.training.state import TrainState
from saelab.training.step import train_step

__all__ = [
    "Diverged",
    "StepMetrics",
    "TrainConfig",
    "TrainState",
    "adopt",
    "batches",
    "centre_of",
    "check",
    "chosen_rate",
    "finalise",
    "finished",
    "fit_steps",
    "n_steps",
    "prepared",
    "read_run",
    "start",
    "train",
    "train_step",
    "train_steps",
]
