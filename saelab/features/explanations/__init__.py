"""Descriptions of latents by a language model behind an OpenAI-compatible endpoint, with scores. Optional."""

from saelab.features.explanations.client import ChatClient
from saelab.features.explanations.imported import ImportedLabel, imported_labels, read_labels, save_labels
from saelab.features.explanations.interpretation import Explanation, InterpretConfig, interpret, interpret_all, load
from saelab.features.explanations.scores import JudgeScore, detection, fuzzing

__all__ = [
    "ChatClient",
    "Explanation",
    "ImportedLabel",
    "InterpretConfig",
    "JudgeScore",
    "detection",
    "fuzzing",
    "imported_labels",
    "interpret",
    "interpret_all",
    "load",
    "read_labels",
    "save_labels",
]
