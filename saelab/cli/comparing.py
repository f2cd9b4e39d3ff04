"""``saelab steer --compare``: the same prompts without steering, and with random directions of equal damage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from saelab.cli.chatting import Steps, continuations, passages, turns
from saelab.cli.console import out
from saelab.steering.measure.control import NONE, EqualDamage, random_controls, with_damage_of

KINDS = ("unsteered", "steered", "random")


def compared(options: Any, steps: Steps, model: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The texts of ``found`` beside those of the unsteered model and of a random control.

    The control makes the same changes along random directions, multiplied so that their damage to the unsteered text,
    KL(unsteered || steered) per token, is that of the steering.
    """
    if options.turns:
        plain = turns(options, [], model, options.prompt)
        controls = controlled(options, steps, model, {"messages": plain})
        found |= {"unsteered": plain}
        if controls:
            (control,) = controls
            found |= {"random": turns(options, control.interventions, model, options.prompt)} | told(control)
        return found
    rows = found["texts"]
    for row, text in zip(rows, continuations(options, [], model, options.prompt)):
        row["unsteered"] = text
    plain = [{"prompt": row["prompt"], "steered": row["unsteered"]} for row in rows]
    for row, one in zip(rows, plain):
        for control in controlled(options, steps, model, {"texts": [one]}):
            (row["random"],) = continuations(options, control.interventions, model, [row["prompt"]])
            row |= told(control)
    return found


def controlled(options: Any, steps: Steps, model: Any, plain: dict[str, Any]) -> list[EqualDamage]:
    """The control of one unsteered text; none where it is empty, so that no damage can be measured."""
    (passage,) = passages(options, model, plain)
    return [with_damage_of(model, random_controls(steps, options.seed), steps, passage)] if passage.written else []


def told(control: EqualDamage) -> dict[str, Any]:
    """How far the control goes."""
    return {
        "random_control": {
            "factor": control.factor,
            "kl": control.damage,
            "kl_steered": control.goal,
            "equal_damage": control.reached,
        }
    }


def about_control(control: dict[str, Any]) -> str:
    """What the control did, beside what it controls for."""
    kl, goal = f"KL {control['kl']:.3g}", f"{control['kl_steered']:.3g} nats per token on the unsteered text"
    if control["kl_steered"] < NONE:
        return f"random directions of the same lengths ({kl}), since the steering does no damage to the unsteered text"
    said = f"random directions, changes times {control['factor']:.3g}: {kl}, the steering {goal}"
    return said if control["equal_damage"] else f"{said}; not of equal damage"


def show_texts(rows: Sequence[dict[str, Any]]) -> None:
    """Each prompt with its texts side by side."""
    for row in rows:
        out.print(Text(f"\n{row['prompt']}", style="bold"))
        for kind in KINDS:
            if kind in row:
                out.print(Text(f"  {kind:<10}", style="dim"), Text(row[kind]))
        if "random_control" in row:
            out.print(Text(f"  {about_control(row['random_control'])}", style="dim"))
