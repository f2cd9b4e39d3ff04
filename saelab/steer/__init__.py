"""Steering: calibrated interventions on a running language model, correct under generation."""

from saelab.steer.calibrate import Calibration, calibrate
from saelab.steer.claims import EffectSize, TwoWay, effect_size, two_way
from saelab.steer.dose import Dose, DoseResponse, dose_response
from saelab.steer.explain import TokenExplanation, explain
from saelab.steer.generate import Comparison, Sampling, compare, generate, generate_tokens, stream
from saelab.steer.hooks import attach
from saelab.steer.interventions import Ablate, Add, Clamp, Intervention, MinClamp, ProjectOut, Scale
from saelab.steer.positions import TokenContext
from saelab.steer.recipe import Recipe
from saelab.steer.run import Run
from saelab.steer.vectors import SteeringVector

__all__ = [
    "Ablate",
    "Add",
    "Calibration",
    "Clamp",
    "Comparison",
    "Dose",
    "DoseResponse",
    "EffectSize",
    "Intervention",
    "MinClamp",
    "ProjectOut",
    "Recipe",
    "Run",
    "Sampling",
    "Scale",
    "SteeringVector",
    "TokenContext",
    "TokenExplanation",
    "TwoWay",
    "attach",
    "calibrate",
    "compare",
    "dose_response",
    "effect_size",
    "explain",
    "generate",
    "generate_tokens",
    "stream",
    "two_way",
]
