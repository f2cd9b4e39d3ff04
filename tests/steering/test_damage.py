"""The damage to one generated text, and strengths for several budgets, against definitions written here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saelab.errors import UserError
from saelab.steering import Add, attach, calibrate, calibrate_each, encode_chat, measure_text
from saelab.steering.measure import calibration
from tests import tiny_lm
from tests.data.test_chat import CHATML
from tests.steering.models import llama, tokenizer
from tests.steering.test_steering import vector

PROMPT, WRITTEN = [5, 6, 70], [72, 8, 31, 9]


def logits(interventions: Any) -> torch.Tensor:
    with torch.no_grad(), attach(llama(), interventions):
        return llama()(input_ids=torch.tensor([PROMPT + WRITTEN])).logits[0].double()


@pytest.mark.parametrize("where", ["all", "prompt"])
def test_damage_is_kl_and_perplexity_of_what_was_written(where: str) -> None:
    steer = Add(vector(), 4.0)
    p, q = logits([]).log_softmax(-1)[2:6], logits(steer).log_softmax(-1)[2:6]
    found = measure_text(llama(), PROMPT, WRITTEN, steer)
    # float32 logits against float64.
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    surprise = -p[range(4), WRITTEN].mean()
    assert found.perplexity == pytest.approx(float(surprise.exp()), rel=1e-4)
    limited = measure_text(llama(), PROMPT, WRITTEN, Add(vector(), 4.0, where=where))
    assert (limited.kl < found.kl * 0.999) == (where == "prompt"), "what was generated is not the prompt"
    assert measure_text(llama(), PROMPT, WRITTEN, []).kl == 0
    with pytest.raises(UserError, match="nothing was written"):
        measure_text(llama(), PROMPT, [], steer)


def test_the_instruction_of_a_chat_is_known() -> None:
    own = tiny_lm.tokenizer()
    own.chat_template = CHATML
    chat = encode_chat(own, [{"role": "user", "content": "a"}])
    ids = [token % 90 + 5 for token in chat.ids]
    steer = Add(vector(), 4.0, where="instruction")
    with pytest.raises(UserError, match="means messages of a chat"):
        measure_text(llama(), ids, WRITTEN, steer)
    found = measure_text(llama(), ids, WRITTEN, steer, chat.roles)
    assert 0 < found.kl < measure_text(llama(), ids, WRITTEN, Add(vector(), 4.0)).kl


def test_several_budgets_share_their_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, budgets = ["w5 w6 w70", "w8 w9"], (0.1, 0.3, 1.0)
    alone = [calibrate(llama(), vector(), prompts, budget_kl=b, tolerance=0.05, tokenizer=tokenizer()) for b in budgets]
    counted: list[float] = []
    real = calibration.damage_in
    monkeypatch.setattr(calibration, "damage_in", lambda *given: (counted.append(1), real(*given))[1])
    found = calibrate_each(llama(), vector(), prompts, budgets, tokenizer=tokenizer())
    assert found == alone
    assert [one.strength for one in found] == sorted(one.strength for one in found)
    assert len(counted) < sum(len(one.trace) for one in alone)
    with pytest.raises(UserError, match="the budget -1 is not"):
        calibrate_each(llama(), vector(), prompts, (0.1, -1), tokenizer=tokenizer())
