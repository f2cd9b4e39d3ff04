"""Optional: have a language model behind an OpenAI-compatible endpoint describe latents, and score what it says."""

from saelab.features.autointerp.client import ChatClient
from saelab.features.autointerp.interpret import Explanation, InterpretConfig, interpret, interpret_all, load
from saelab.features.autointerp.score import JudgeScore, detection, fuzzing

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
