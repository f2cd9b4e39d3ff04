"""Steering: interventions on a language model while it reads and writes, and measurements of their effects."""

from saelab.runs import Run
from saelab.steering.attachment import attach
from saelab.steering.generation import Comparison, Sampling, compare, generate, generate_tokens, stream
from saelab.steering.interventions import Ablate, Add, Clamp, Intervention, MinClamp, ProjectOut, Scale
from saelab.steering.measure.attribution import TokenExplanation, explain
from saelab.steering.measure.calibration import Calibration, calibrate
from saelab.steering.measure.dose_response import Dose, DoseResponse, dose_response
from saelab.steering.measure.effect_size import EffectSize, TwoWay, effect_size, two_way
from saelab.steering.positions import TokenContext
from saelab.steering.recipe.recipe import Recipe
from saelab.steering.vectors import SteeringVector

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
