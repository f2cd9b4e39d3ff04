"""Controls: dictionaries that have learned less, or nothing, measured as the SAE is.

A number that such a dictionary reaches as well says nothing about what the SAE has learned.
"""

from saelab.evaluation.controls.dictionaries import random_directions, raw_channels, untrained
from saelab.evaluation.controls.measuring import CONTROLS, Control, ControlConfig, measure_controls
from saelab.evaluation.controls.trained import frozen_dictionary, random_transformer

__all__ = [
    "CONTROLS",
    "Control",
    "ControlConfig",
    "frozen_dictionary",
    "measure_controls",
    "random_directions",
    "random_transformer",
    "raw_channels",
    "untrained",
]
