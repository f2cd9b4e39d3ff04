"""Texts of unequal length in one batch are read, steered and continued as each of them alone by plain transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from saelab.errors import UserError
from saelab.lm.padding import masks_padding
from saelab.lm.structure import blocks
from saelab.lm.tokens import padded
from saelab.steering import Add, SteeringVector, generate_tokens
from saelab.steering.directions import read_texts
from saelab.steering.generation import forward
from saelab.steering.measure.effects import UnsteeredBaseline
from saelab.steering.rows import on_rows
from tests import tiny_lm
from tests.zoo.families import BLOCKS, FAMILIES, VOCABULARY, WIDTH, _randomise

STATES = ["mamba", "mamba2", "jamba", "bamba", "falcon-h1", "nemotron-h", "qwen3-next", "lfm2", "minimax"]
NAMES = ["llama", "gemma2", *STATES, "recurrent-gemma", "rwkv"]
TEXTS = ["the cat sat on a mat", "rain", "seven ships left the quiet harbour", "old roofs", "snow"]
HOOK = "blocks.1.hook_resid_post"
pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def model(name: str) -> Any:
    if name != "rwkv":
        found = FAMILIES[name].build()
    else:
        config = transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS)
        torch.manual_seed(0)
        found = transformers.RwkvForCausalLM(config).eval()
        _randomise(found, 0)
    found.tokenizer = tiny_lm.tokenizer()
    return found


def rows_of(name: str) -> list[list[int]]:
    own = model(name).tokenizer
    return [[own.bos_token_id, *own(text, add_special_tokens=False)["input_ids"]] for text in TEXTS]


@torch.no_grad()
def alone(name: str, row: list[int], shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The logits and the stream behind block 1 of one text, which ``shift`` is added to, without anything of saelab."""
    seen: list[Tensor] = []

    def edit(_module: Any, _args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        seen.append(first[0].clone())
        return (first + shift, *output[1:]) if isinstance(output, tuple) else first + shift

    handle = blocks(model(name))[1][1].register_forward_hook(edit)
    logits = model(name)(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    handle.remove()
    return logits, seen[0]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_padding_on_the_left_changes_no_logit_or_is_refused(name: str) -> None:
    rows = rows_of(name)
    ids, mask = padded(rows, 1)
    assert masks_padding(model(name)) == (name != "rwkv")
    if name == "rwkv":
        with pytest.raises(UserError, match=r"RwkvForCausalLM keeps a state .* give one text at a time"):
            forward(model(name), ids, mask)
        return
    found = forward(model(name), ids, mask)[0]
    for row, logits in zip(rows, found):
        expected = alone(name, row)[0]
        torch.testing.assert_close(logits[-len(row) :], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_row_is_continued_as_it_is_alone(name: str, use_cache: bool) -> None:
    rows = rows_of(name)
    torch.manual_seed(3)
    size = 2 * float(alone(name, rows[0])[1].norm(dim=-1).mean())
    vectors = [SteeringVector.from_tensor(torch.randn(WIDTH), HOOK) for _ in range(2)]
    first, second = (Add(vector, size, skip_first=False) for vector in vectors)
    steered = [*on_rows(first, [0, 3, 4]), *on_rows(second, [1])]
    shifts = [vectors[0].direction * size, vectors[1].direction * size, torch.zeros(WIDTH)]
    ids, mask = padded(rows, 1)
    found = generate_tokens(model(name), ids, mask, steered, max_new_tokens=4, use_cache=use_cache, stop_at_eos=False)
    for row, which, continuation in zip(rows, (0, 1, 2, 0, 0), found):
        for token in continuation:
            assert token == int(alone(name, row, shifts[which])[0][-1].argmax())
            row.append(token)


@pytest.mark.parametrize("tokens", ["mean", "last"])
def test_texts_are_read_as_they_are_alone(name: str, tokens: str) -> None:
    streams = [alone(name, row)[1][1:] for row in rows_of(name)]
    expected = torch.stack([stream[-1] if tokens == "last" else stream.mean(0) for stream in streams])
    found, norms = read_texts(model(name), HOOK, TEXTS, tokens, batch_size=3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms, torch.cat(streams).norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_effects_of_a_batch_are_those_of_its_texts(name: str) -> None:
    add = Add(SteeringVector.from_tensor(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)), HOOK), 3.0)
    together = UnsteeredBaseline(model(name), TEXTS).measure(add)
    for place, text in enumerate(TEXTS):
        single = UnsteeredBaseline(model(name), [text]).measure(add)
        torch.testing.assert_close(together.kl[place], single.kl[0], rtol=1e-3, atol=1e-4)
