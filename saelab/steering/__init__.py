"""Steering: interventions on a running language model, correct under cached, padded and streamed generation.

The model is always the first argument. Functions that write text (``generate``, ``compare``, ``attribute_logits``)
take the prompts next and then the interventions; functions that measure (``calibrate``, ``dose_response``,
``effect_size``, ``two_way``) take what is measured next and then the texts to measure on.

A steering operation is one class, see :mod:`saelab.steering.interventions`; those that saelab has are in
:mod:`saelab.steering.operations`.
"""

from saelab.runs import Run
from saelab.steering.attachment import attach
from saelab.steering.directions import difference_of_means, pca, probe, random_direction, text_activations
from saelab.steering.generation import Comparison, Sampling, compare, generate, generate_tokens, stream
from saelab.steering.interventions import OPERATIONS, Amount, Intervention, LatentIntervention, VectorIntervention
from saelab.steering.measure.attribution import TokenAttribution, attribute_logits
from saelab.steering.measure.calibration import Calibration, calibrate
from saelab.steering.measure.dose_response import Dose, DoseResponse, dose_response
from saelab.steering.measure.effect_size import EffectSize, TwoWay, effect_size, two_way
from saelab.steering.operations import Ablate, Add, Clamp, MinClamp, ProjectOut, Scale
from saelab.steering.positions import TokenContext
from saelab.steering.recipe.recipe import Recipe
from saelab.steering.vectors import SteeringVector

__all__ = [
    "OPERATIONS",
    "Ablate",
    "Add",
    "Amount",
    "Calibration",
    "Clamp",
    "Comparison",
    "Dose",
    "DoseResponse",
    "EffectSize",
    "Intervention",
    "LatentIntervention",
    "MinClamp",
    "ProjectOut",
    "Recipe",
    "Run",
    "Sampling",
    "Scale",
    "SteeringVector",
    "TokenAttribution",
    "TokenContext",
    "TwoWay",
    "VectorIntervention",
    "attach",
    "attribute_logits",
    "calibrate",
    "compare",
    "difference_of_means",
    "dose_response",
    "effect_size",
    "generate",
    "generate_tokens",
    "pca",
    "probe",
    "random_direction",
    "stream",
    "text_activations",
    "two_way",
]
