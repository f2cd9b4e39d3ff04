"""Descriptions of latents by a language model behind an OpenAI-compatible endpoint, with scores. Optional."""

from saelab.features.explanations.client import ChatClient
from saelab.features.explanations.interpretation import Explanation, InterpretConfig, interpret, interpret_all, load
from saelab.features.explanations.scores import JudgeScore, detection, fuzzing

__all__ = [
    "ChatClient",
    "Explanation",
    "InterpretConfig",
    "JudgeScore",
    "detection",
    "fuzzing",
    "interpret",
    "interpret_all",
    "load",
]
