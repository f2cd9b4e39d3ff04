"""``saelab steer --strength auto``: the strength of the intervention as it will be applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from saelab.cli.chatting import as_text, opening
from saelab.cli.console import console
from saelab.errors import UserError
from saelab.lm.tokens import end_ids, token_ids
from saelab.steering import Calibration, Intervention, SteeringVector, calibrate, encode_chat
from saelab.steering.chat import turn_ends
from saelab.steering.measure.calibration import activation_norm
from saelab.steering.measure.passages import calibrate_on, written_by
from saelab.steering.neutral import NEUTRAL

BUDGET = 0.3  # nats per token
Maker = Callable[[float], list[Intervention]]


def calibrated(
    options: Any, model: Any, vector: SteeringVector, prompts: Sequence[str], make: Maker
) -> list[Intervention]:
    """What ``make`` gives at the largest strength whose damage stays within the budget, which is printed.

    What acts on every token alike is measured on the prompts, or without any on five neutral sentences; what acts on
    answers, on generated tokens or by a schedule, on what the unsteered model writes after them.
    """
    budget = BUDGET if options.budget_kl is None else options.budget_kl
    texts = list(prompts) or NEUTRAL
    read = [as_text(options, model, text) for text in texts] if options.chat and prompts else texts
    limit = 4 * (vector.rms_norm or activation_norm(model, vector.hook_name, read))
    try:
        if options.where in ("all", "prompt") and options.schedule is None:
            found = calibrate(model, make, read, budget_kl=budget, limit=limit)
        else:
            found = on_written_text(options, model, texts, make, budget, limit)
    except UserError as error:
        if options.when_latent is not None and "change nothing" in str(error):
            where = "the prompts" if prompts else "the neutral sentences of the calibration"
            raise UserError(
                f"latent {options.when_latent} never fires above --when-above on {where}, so no strength can be "
                "calibrated; give a --prompt on which it fires, or a --strength"
            ) from None
        raise
    beyond = "" if found.reached else ", and no larger strength that was tried reaches the budget"
    console.print(
        f"strength {found.strength:.3g}: KL {found.damage:.3g} of a budget of {found.budget:g} nats per token{beyond}"
    )
    return make(found.strength)


def on_written_text(
    options: Any, model: Any, texts: Sequence[str], make: Maker, budget: float, limit: float
) -> Calibration:
    """The calibration on the unsteered model's own continuations or answers."""
    tokenizer = model.tokenizer
    if options.chat:
        chats = [encode_chat(tokenizer, opening(options, text)) for text in texts]
        beginnings: list[Any] = [(chat.ids, chat.roles) for chat in chats]
        ends = turn_ends(model, tokenizer)
    else:
        beginnings, ends = [(token_ids(tokenizer, text), None) for text in texts], end_ids(model, tokenizer)
    passages = written_by(model, beginnings, ends, options.max_new_tokens)
    return calibrate_on(model, make, passages, budget, limit)
