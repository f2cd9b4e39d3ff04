"""``saelab steer --compare``: the same prompts without steering, and with random directions of equal damage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from saelab.cli.chatting import Steps, continuations, passages, show_messages, turns
from saelab.cli.console import out
from saelab.errors import UserError
from saelab.steering.measure.control import EqualDamage, random_controls, with_damage_of

KINDS = ("unsteered", "steered", "random")


def compared(options: Any, steps: Steps, model: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The texts of ``found`` beside those of the unsteered model and of a random control.

    The control makes the same changes along random directions, multiplied so that their damage to the unsteered text,
    KL(unsteered || steered) per token, is that of the steering. Where there is none, ``no_random_control`` says why.
    """
    try:
        controls = random_controls(steps, options.seed)
    except UserError as error:  # an operation of somebody's own
        controls, found["no_random_control"] = None, str(error)

    def matched(plain: dict[str, Any], told: dict[str, Any]) -> EqualDamage | None:
        if controls is None:
            return None
        (passage,) = passages(options, model, plain)
        if not passage.written:
            told["no_random_control"] = "the unsteered model wrote nothing on which damages could be compared"
            return None
        made = with_damage_of(model, controls, steps, passage)
        told["random_control"] = {
            "factor": made.factor,
            "kl": made.damage,
            "kl_steered": made.goal,
            "equal_damage": made.reached,
            "said": made.sentence,
        }
        return made

    if options.turns:
        found["unsteered"] = turns(options, [], model, options.prompt)
        if made := matched({"messages": found["unsteered"]}, found):
            found["random"] = turns(options, made.interventions, model, options.prompt)
        return found
    for row, text in zip(found["texts"], continuations(options, [], model, options.prompt)):
        row["unsteered"] = text
        if made := matched({"texts": [{"prompt": row["prompt"], "steered": text}]}, row):
            (row["random"],) = continuations(options, made.interventions, model, [row["prompt"]])
    return found


def about_control(told: dict[str, Any]) -> str:
    """What the control did, beside what it controls for; empty where none was asked for."""
    if "no_random_control" in told:
        return f"no random control: {told['no_random_control']}"
    if "random_control" not in told:
        return ""
    return f"random directions, {told['random_control']['said']}"


def show_compared(result: dict[str, Any]) -> None:
    """Chats one after another, or each prompt with its texts; below them what the control did."""
    for title, key in (("", "messages"), ("unsteered", "unsteered"), ("random", "random")):
        if key in result:
            show_messages(result[key], title)
    rows: Sequence[dict[str, Any]] = result.get("texts", [])
    for row in rows:
        out.print(Text(f"\n{row['prompt']}", style="bold"))
        for kind in KINDS:
            if kind in row:
                out.print(Text(f"  {kind:<10}", style="dim"), Text(row[kind]))
        if said := about_control(row):
            out.print(Text(f"  {said}", style="dim"))
    if said := about_control(result):
        out.print(Text(said, style="dim"))
