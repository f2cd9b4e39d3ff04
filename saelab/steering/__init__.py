"""Steering: interventions on a running language model, correct under cached, padded and streamed generation.

The model is always the first argument. Functions that write text (``generate``, ``compare``, ``attribute_logits``)
take the prompts next and then the interventions; functions that measure (``calibrate``, ``dose_response``,
``effect_size``, ``two_way``) take what is measured next and then the texts to measure on.

A steering operation is one class, see :mod:`saelab.steering.interventions`; those that saelab has are in
:mod:`saelab.steering.operations`. Any of them may be limited to tokens on which a latent or a probe fires
(:mod:`saelab.steering.conditions`) and weighted over the generated tokens (:mod:`saelab.steering.schedule`).
"""

from saelab.runs import Run
from saelab.steering.attachment import attach
from saelab.steering.chat import Answerer, Chat, EncodedChat, answer_chats, encode_chat
from saelab.steering.conditions import Condition, LatentFires, ProbeFires
from saelab.steering.directions import difference_of_means, pca, probe, random_direction, text_activations
from saelab.steering.generation import Comparison, Sampling, compare, generate, generate_tokens, stream
from saelab.steering.interventions import OPERATIONS, Amount, Intervention, LatentIntervention, VectorIntervention
from saelab.steering.layers import at_layers
from saelab.steering.measure.attribution import TokenAttribution, attribute_logits
from saelab.steering.measure.calibration import Calibration, calibrate, calibrate_each
from saelab.steering.measure.dose_response import Dose, DoseResponse, dose_response
from saelab.steering.measure.effect_size import EffectSize, TwoWay, effect_size, two_way
from saelab.steering.measure.texts import TextDamage, measure_text
from saelab.steering.operations import Ablate, Add, Cap, Clamp, MinClamp, ProjectOut, Scale
from saelab.steering.positions import TokenContext
from saelab.steering.recipe.recipe import Recipe
from saelab.steering.schedule import Schedule
from saelab.steering.vectors import SteeringVector

__all__ = [
    "OPERATIONS",
    "Ablate",
    "Add",
    "Amount",
    "Answerer",
    "Calibration",
    "Cap",
    "Chat",
    "Clamp",
    "Comparison",
    "Condition",
    "Dose",
    "DoseResponse",
    "EffectSize",
    "EncodedChat",
    "Intervention",
    "LatentFires",
    "LatentIntervention",
    "MinClamp",
    "ProbeFires",
    "ProjectOut",
    "Recipe",
    "Run",
    "Sampling",
    "Scale",
    "Schedule",
    "SteeringVector",
    "TextDamage",
    "TokenAttribution",
    "TokenContext",
    "TwoWay",
    "VectorIntervention",
    "answer_chats",
    "at_layers",
    "attach",
    "attribute_logits",
    "calibrate",
    "calibrate_each",
    "compare",
    "difference_of_means",
    "dose_response",
    "effect_size",
    "encode_chat",
    "generate",
    "generate_tokens",
    "measure_text",
    "pca",
    "probe",
    "random_direction",
    "stream",
    "text_activations",
    "two_way",
]
