"""Every other causal class of the installed transformers that a small configuration builds: each point of a block is
what its definition says, or is refused in one line. No family is prepared here, so new ones are tested as they appear.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from saelab.errors import UserError
from saelab.harvesting.activations import Reader
from saelab.lm import locate
from tests.zoo.families import FAMILIES, NAMES, _randomise, _sizes, places

pytestmark = [pytest.mark.minutes, pytest.mark.filterwarnings("ignore")]
EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
SETTINGS = (
    _sizes(head_dim=8, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1, **EXPERTS),
    _sizes(num_key_value_heads=4),
    {"vocab_size": 320, "n_embd": 32, "n_layer": 3, "n_head": 4},
)
LARGEST = 10_000_000  # parameters; a class that takes its sizes from elsewhere is passed over
POST_NORM = {"trocr"}  # the stream is what a norm makes of each sum
COUNTED_OTHERWISE = {"rwkv"}  # its hidden states begin behind the first block


def kinds() -> list[str]:
    prepared = {family.model for family in FAMILIES.values()}
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    found = {kind: name if isinstance(name, str) else name[0] for kind, name in names}
    return [
        kind for kind, name in found.items() if name not in prepared and {name, CONFIG_MAPPING_NAMES[kind]} <= NAMES
    ]


def built(kind: str) -> Any:
    """A tiny model of the kind, or a skipped test."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    name, reason = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], ""
    cls: Any = getattr(transformers, name if isinstance(name, str) else name[0])
    for settings in SETTINGS:
        try:
            config = getattr(transformers, CONFIG_MAPPING_NAMES[kind])(**settings)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in cls(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size:,} parameters")
            model = cls(config).eval()
            _randomise(model, 0)
            model(input_ids=torch.arange(9, 19)[None])
            return model
        except Exception as error:  # whatever its configuration or its code wants
            reason = f"{type(error).__name__}: {error}"
    return pytest.skip(f"needs a configuration of its own ({reason[:80]})")


@pytest.mark.parametrize("kind", kinds())
def test_a_point_is_what_it_is_defined_to_be_or_refused(kind: str) -> None:
    model, found = built(kind), dict[str, Tensor]()
    ids = torch.randint(9, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    for point in places():
        try:
            (found[point],) = Reader(model, [locate(model, f"blocks.1.{point}")]).activations(ids)
        except UserError as error:
            assert "\n" not in str(error)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    pre, mid, post = (found.get(f"hook_resid_{name}") for name in ("pre", "mid", "post"))
    if kind in POST_NORM or pre is None or mid is None or post is None:
        return
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    if kind not in COUNTED_OTHERWISE and isinstance(hidden, tuple) and hidden[2:] and hidden[2].shape == post.shape:
        torch.testing.assert_close(pre, hidden[1], **close)
        torch.testing.assert_close(post, hidden[2], **close)
    if "hook_attn_out" in found:
        torch.testing.assert_close(pre + found["hook_attn_out"], mid, **close)
    if "hook_mlp_out" in found:
        torch.testing.assert_close(mid + found["hook_mlp_out"], post, **close)
