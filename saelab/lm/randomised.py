"""A language model whose weights are drawn at random: the control of Heap et al. (2025, arXiv 2501.17727).

What an SAE shows of a model that has learned nothing is no evidence about what the real one has learned. The paper
re-randomises a trained model: each parameter, norms and biases included, is replaced by independent Gaussian numbers
with the mean and the standard deviation of that parameter, with the embeddings ("incl. embeddings") or without them
("excl. embeddings"). Its two other controls, a model before its first training step and Gaussian activations, are not
made here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_type_hints

import torch
from torch import nn

from saelab.errors import UserError, check_choices
from saelab.lm.fingerprint import is_quantised, named_weights
from saelab.lm.offload import is_offloaded
from saelab.lm.structure import underlying

_EMBEDDINGS = ("embed", "wte", "wpe")
RANDOM = "saelab_random_weights"  # attribute of a model that says how its weights were drawn


@dataclass(frozen=True)
class RandomWeights:
    """Which parameters of a model are drawn at random, and with which seed."""

    which: Literal["all", "all-but-embeddings"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(vars(self), get_type_hints(RandomWeights))

    def record(self) -> dict[str, Any]:
        """For the manifest of a cache: what was randomised and how."""
        how = "each parameter replaced by Gaussian numbers of its own mean and standard deviation (arXiv 2501.17727)"
        return {**asdict(self), "how": how}

    def __str__(self) -> str:
        return f"random weights: {self.which}, seed {self.seed}"


@torch.no_grad()
def randomise(model: nn.Module, random: RandomWeights) -> None:
    """Replace the parameters of a plain Hugging Face model in place.

    A parameter of one number, and one whose numbers are all equal, keeps its value, since its standard deviation is 0.
    UserError for a quantised or an offloaded model, whose weights cannot be drawn.
    """
    if is_quantised(model):
        raise UserError("the weights of a quantised model cannot be drawn at random; load it in full precision")
    if is_offloaded(model):
        raise UserError(
            "the weights of a model that is offloaded or divided cannot be drawn at random; give it one device"
        )
    kept = _embeddings(model) if random.which == "all-but-embeddings" else set()
    generator = torch.Generator().manual_seed(random.seed)
    for name, tensor in named_weights(model):
        if id(tensor) in kept or (kept and any(part in name.lower() for part in _EMBEDDINGS)):
            continue
        values = tensor.float()
        sd = float(values.std()) if values.numel() > 1 else 0.0
        drawn = torch.randn(tensor.shape, generator=generator) * sd + float(values.mean())
        tensor.copy_(drawn.to(tensor))
    setattr(underlying(model), RANDOM, random)


def _embeddings(model: nn.Module) -> set[int]:
    """The embedding and the unembedding, which share one tensor in many models."""
    root: Any = underlying(model)
    modules = [root.get_input_embeddings(), root.get_output_embeddings()]
    return {id(module.weight) for module in modules if module is not None}
