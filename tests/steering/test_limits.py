"""Limits of interventions: a cap along a direction, several layers, conditions and schedules.

That they do the same cached, uncached, batched, padded, on a bridge and in the model's own ``generate`` is tested with
all others in test_steering; here they are compared with hooks of torch written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.errors import UserError
from saelab.sae import build
from saelab.steering import (
    Ablate,
    Add,
    Cap,
    Clamp,
    Condition,
    LatentFires,
    ProbeFires,
    ProjectOut,
    Recipe,
    Run,
    Scale,
    Schedule,
    SteeringVector,
    at_layers,
    attach,
)
from saelab.steering.recipe import export_gguf
from tests.steering.models import HOOK, llama
from tests.steering.test_steering import IDS, MASK, RUN, captured, edited, plain, vector

EARLY = "blocks.0.hook_resid_post"
ROW = IDS[1:]


@contextmanager
def hooked(edits: dict[int, Callable[[Tensor], Any]]) -> Iterator[None]:
    """Torch's own hooks on the outputs of blocks of the plain model."""
    layers = llama().model.layers
    handles = [layers[i].register_forward_hook(lambda _m, _a, out, edit=edit: edit(out)) for i, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(interventions: Any = ()) -> Tensor:
    with torch.no_grad(), attach(llama(), interventions):
        return llama()(input_ids=ROW).logits


def hooked_logits(edits: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    with torch.no_grad(), hooked(edits):
        return llama()(input_ids=ROW).logits


def test_a_cap_lowers_what_lies_above_it_and_leaves_the_rest() -> None:
    before, after = captured(llama(), [])[MASK.bool()], captured(llama(), Cap(vector(), 0.5))[MASK.bool()]
    direction = vector().direction.double()
    along, now = before.double() @ direction, after.double() @ direction
    assert (along > 0.6).any() and (along < 0.4).any(), "nothing to see"
    # float32, sums over 32 entries of size about 1.
    torch.testing.assert_close(now, along.clamp(max=0.5), rtol=0, atol=1e-4)
    rest = before.double() - along[:, None] * direction
    torch.testing.assert_close(after.double() - now[:, None] * direction, rest, rtol=0, atol=1e-4)
    held = captured(llama(), Cap(-vector(), -0.5))[MASK.bool()].double() @ direction
    torch.testing.assert_close(held, along.clamp(min=0.5), rtol=0, atol=1e-4)


def test_several_layers_are_hooks_at_each_of_them() -> None:
    direction = vector().direction

    def shift(x: Tensor) -> Tensor:
        return x + 5.0 * direction

    def remove(x: Tensor) -> Tensor:
        return x - (x @ direction)[..., None] * direction

    found = logits(at_layers(llama(), Add(vector(), 5.0), [0, 2]))
    torch.testing.assert_close(found, hooked_logits({0: shift, 2: shift}), rtol=1e-4, atol=1e-4)
    made = at_layers(llama(), ProjectOut(SteeringVector.from_tensor(direction, "model.layers.1")), "all")
    assert [one.hook_name for one in made] == [f"model.layers.{i}" for i in range(3)]
    torch.testing.assert_close(logits(made), hooked_logits(dict.fromkeys(range(3), remove)), rtol=1e-4, atol=1e-4)


def test_a_probe_of_an_earlier_layer_decides() -> None:
    probe, seen = vector(2, EARLY), []
    with torch.no_grad(), hooked({0: lambda out: seen.append(out @ probe.direction)}):
        llama()(input_ids=ROW)
    (component,) = seen
    threshold = float(component.flatten().sort().values[1:3].mean())
    fires = component > threshold
    assert 0 < fires.sum() < fires.numel()
    expected = hooked_logits({1: lambda x: torch.where(fires[..., None], x + 9.0 * vector().direction, x)})
    found = logits(Add(vector(), 9.0, when=ProbeFires(probe, threshold)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_latent_decides_and_is_read_before_it_is_changed() -> None:
    """Where latent 3 fires above a threshold, it is ablated and a vector added: neither hides it from the other."""
    x = captured(llama(), [])
    values = RUN.sae.encode(x[1]).dense()[:, 3].detach()
    values[0] = 0.0
    threshold = float(values.max()) / 2
    fires = values > threshold
    assert 0 < fires.sum() < len(fires)
    condition = LatentFires(RUN, 3, threshold)
    after = captured(llama(), [Ablate(RUN, 3), Add(vector(), 9.0, when=condition)])[1]
    with torch.no_grad():
        expected = edited(lambda v: v * 0, 3)[3:] + 9.0 * fires[:, None] * vector().direction
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_half_of_a_change_is_half_of_it() -> None:
    x = captured(llama(), [])[MASK.bool()]
    for one in (Clamp(RUN, 3, 4.0), Add(vector(), 4.0), ProjectOut(vector()), Scale(RUN, 3, -2.0)):
        whole, half = (captured(llama(), one.times(factor))[MASK.bool()] for factor in (1.0, 0.5))
        torch.testing.assert_close(half - x, (whole - x) / 2, rtol=1e-4, atol=1e-4)
        assert torch.equal(captured(llama(), one.times(0.0))[MASK.bool()], x)


def test_a_schedule_weighs_each_generated_token() -> None:
    """Token by token, by hand: the hook adds what the schedule says for that token."""
    schedule = Schedule([(0, 0.25), (4, 1.25), (6, 0.0)])
    weights = [0.25, 0.5, 0.75, 1.0, 1.25, 0.625, 0.0, 0.0]
    found = plain(llama(), interventions=Add(vector(), 12.0, schedule=schedule))[1]
    ids, written = ROW, []
    for step in range(8):
        whole = torch.tensor([0.25] * ROW.shape[1] + weights[:step])
        with torch.no_grad(), hooked({1: lambda x, w=whole: x + 12.0 * w[:, None] * vector().direction}):
            written.append(int(llama()(input_ids=ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([written[-1:]])], dim=1)
    assert found[:8] == written
    assert found != plain(llama(), interventions=Add(vector(), 12.0 * 0.25))[1]
    before = Add(vector(), 9.0, schedule=Schedule([(-4, 0), (0, 1)]))
    assert torch.equal(logits(before), logits()), "the prompt has the weight of the first point, also at its end"


def test_they_live_in_a_recipe(tmp_path: Path) -> None:
    limited = [
        Add(vector(), 15.0, when=LatentFires(RUN, 3, 0.5)),
        Clamp(RUN, 20, 8.0, when=ProbeFires(vector(2, EARLY)), schedule=Schedule([(0, 1), (6, 0)])),
        *at_layers(llama(), Cap(vector(3), 0.1), [0, 2]),
    ]
    expected = plain(llama(), interventions=limited)
    Recipe.of(llama(), limited).save(tmp_path / "recipe")
    loaded = Recipe.load(tmp_path / "recipe")
    assert loaded.settings() == [one.settings() for one in limited]
    assert len(list((tmp_path / "recipe").glob("sae_*"))) == 1, "one SAE is stored once"
    with loaded.attach(llama()):
        assert plain(llama()) == expected
    Recipe.of(llama(), limited[2:]).save(tmp_path / "plain")
    texts = [(tmp_path / name / "recipe.json").read_text() for name in ("recipe", "plain")]
    assert ['"version": 2' in text for text in texts] == [True, False], "older readers would pass over a condition"
    with pytest.raises(UserError, match="without skip_first, condition and schedule"):
        export_gguf(Recipe.of(llama(), Add(vector(), schedule=Schedule([(0, 1)]))), tmp_path / "v.gguf")


class Never(Condition):
    hook_name, d_in = HOOK, 32

    def holds(self, x, context):
        return torch.zeros(x.shape[:2], dtype=torch.bool)

    def settings(self):
        return {"kind": "never"}


def test_a_condition_of_ones_own_acts_but_is_not_saved(tmp_path: Path) -> None:
    never = Add(vector(), 9.0, when=Never())
    assert torch.equal(logits(never), logits())
    with pytest.raises(UserError, match="the condition Never cannot be written"):
        Recipe.of(llama(), never).save(tmp_path / "recipe")


WIDE = Run(build("topk", d_in=16, d_sae=8, k=2), HOOK)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Add(vector(hook=EARLY), when=LatentFires(RUN, 3)), "is read at blocks.1.hook_resid_post, after the"),
        (
            lambda: Add(vector(hook="blocks.1.hook_mlp_out"), when=LatentFires(RUN, 3)),
            "read it at the same hook point or an earlier one",
        ),
        (lambda: LatentFires(RUN, 64), "latent 64 does not exist"),
        (lambda: LatentFires(RUN, 3, -0.5), "the threshold -0.5 is negative"),
        (lambda: LatentFires(RUN, 3, "1max"), "needs a maximum activation"),
        (lambda: LatentFires(RUN, 3, pole=0), "pole 0 is neither 1 nor -1"),
        (lambda: LatentFires("run", 3), "takes a Run, not a str"),
        (lambda: ProbeFires(vector(), "much"), "is not a number"),
        (lambda: Add(vector(), when=LatentFires(WIDE, 3)), "reads width 16, the model's activations have 32"),
        (lambda: Schedule([]), "needs finite numbers"),
        (lambda: Schedule([(3, 1), (1, 0)]), "in increasing order"),
        (lambda: Schedule([(0, float("nan"))]), "needs finite numbers"),
        (lambda: Schedule(3), "is a list of pairs"),
        (lambda: Schedule.parse("0-1"), "is not a list of TOKEN:WEIGHT"),
        (lambda: Add(vector()).times(float("inf")), "cannot be multiplied by inf"),
        (lambda: Cap(vector(), "1max"), "needs a maximum activation"),
        (lambda: at_layers(llama(), Add(vector()), [1, 3]), "layer 3 does not exist: the model has 3 blocks, 0 to 2"),
        (lambda: at_layers(llama(), Add(vector()), [1, 1]), "names one twice"),
        (lambda: at_layers(llama(), Add(vector()), []), "layers is empty"),
        (lambda: at_layers(llama(), Add(vector()), "some"), 'neither "all" nor a list'),
        (lambda: at_layers(llama(), Add(vector(hook="hook_embed")), [1]), "names no block"),
        (lambda: at_layers(llama(), Ablate(RUN, 3), [1]), "whose SAE has one layer"),
        (lambda: Add(vector(), where="answer"), "means messages of a chat, and this text is none"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        logits(make())
    assert message in str(error.value) and "\n" not in str(error.value)
