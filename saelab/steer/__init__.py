"""Steering: calibrated interventions on a running language model, correct under generation."""

from saelab.steer.generate import Comparison, Sampling, compare, generate, generate_tokens, stream
from saelab.steer.hooks import attach
from saelab.steer.interventions import Ablate, Add, Clamp, Intervention, MinClamp, ProjectOut, Scale
from saelab.steer.positions import TokenContext
from saelab.steer.run import Run
from saelab.steer.vectors import SteeringVector

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "Comparison",
    "Intervention",
    "MinClamp",
    "ProjectOut",
    "Run",
    "Sampling",
    "Scale",
    "SteeringVector",
    "TokenContext",
    "attach",
    "compare",
    "generate",
    "generate_tokens",
    "stream",
]
