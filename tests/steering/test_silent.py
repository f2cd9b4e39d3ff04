"""Changes that do nothing on a text are found, with the reason, as the model itself shows."""

from __future__ import annotations

import pytest
import torch

from saelab.steering import Ablate, Add, Clamp, Intervention, LatentFires, Scale, SteeringVector
from saelab.steering.measure.passages import Passage
from saelab.steering.measure.silent import reason, without_effect
from saelab.steering.measure.texts import measure_text
from tests.steering.models import llama
from tests.steering.test_steering import RUN

BEGINNING, WRITTEN = [1, 5, 6, 70], [8, 9, 10, 44, 31]
TEXT = Passage(BEGINNING, WRITTEN)


def kl(steps: list[Intervention], given: list[Intervention] = []) -> float:  # noqa: B006
    """The damage of steps beyond that of others; zero where they do nothing."""
    found = [measure_text(llama(), [1], [*BEGINNING[1:], *WRITTEN], some).kl for some in (steps + given, given)]
    return found[0] - found[1]


def activations() -> torch.Tensor:
    """The code of each token but the first, ``[tokens, latents]``."""
    from saelab.lm.sites import locate

    seen = []
    with locate(llama(), RUN.hook_name).register(llama(), lambda x: seen.append(x.clone())), torch.no_grad():
        llama()(torch.tensor([BEGINNING + WRITTEN]))
    return RUN.sae.encode(seen[0][0, 1:]).dense().detach()


def test_an_ablation_does_nothing_exactly_where_its_latent_is_silent() -> None:
    fires = (activations() > 0).any(dim=0)
    assert bool(fires.any()) and not bool(fires.all())
    for latent in range(RUN.sae.d_sae):
        for step in (Ablate(RUN, latent, pole=1), Scale(RUN, latent, 3.0, pole=1)):
            silent = without_effect(llama(), [step], [TEXT])
            assert bool(silent) != bool(fires[latent]), (latent, step)
            if silent:
                assert kl([step]) == 0.0
                assert reason(step, silent[0]) == f"latent {latent} fires on no token that it acts on"


def test_only_the_tokens_that_are_changed_count() -> None:
    code = activations()
    prompt = len(BEGINNING) - 1
    alone = ((code[:prompt] > 0).any(0) & ~(code[prompt:] > 0).any(0)).nonzero()[:, 0]
    latent = int(alone[0])
    assert without_effect(llama(), [Ablate(RUN, latent, pole=1, where="generated")], [TEXT])
    assert not without_effect(llama(), [Ablate(RUN, latent, pole=1, where="prompt")], [TEXT])
    # One passage on which it acts is enough.
    both = [TEXT, Passage(WRITTEN[:1], BEGINNING + WRITTEN)]
    assert not without_effect(llama(), [Ablate(RUN, latent, pole=1)], both)


def test_a_condition_that_never_holds_is_the_reason() -> None:
    largest = activations().max(dim=0).values
    latent = int(largest.argmax())
    vector = SteeringVector.from_latent(RUN, 3)
    never = Add(vector, 2.0, when=LatentFires(RUN, latent, 2 * float(largest[latent])))
    often = Add(vector, 2.0, when=LatentFires(RUN, latent, 0.5 * float(largest[latent])))
    found = without_effect(llama(), [never, often], [TEXT])
    assert list(found) == [0] and kl([never]) == 0.0 and kl([often]) != 0.0
    assert reason(never, found[0]).startswith(f"latent {latent} is above {2 * float(largest[latent]):.3g} on no token")


def test_a_latent_and_a_condition_must_meet_on_one_token() -> None:
    on = activations() > 0
    apart = [(a, b) for a in range(on.shape[1]) for b in range(on.shape[1])
             if on[:, a].any() and on[:, b].any() and not (on[:, a] & on[:, b]).any()]  # fmt: skip
    a, b = apart[0]
    step = Ablate(RUN, a, pole=1, when=LatentFires(RUN, b, 0.0))
    found = without_effect(llama(), [step], [TEXT])
    assert kl([step]) == 0.0
    assert reason(step, found[0]) == f"latent {b} fires and latent {a} fires at once on no token that it acts on"


def test_what_acts_on_silent_latents_too_is_not_judged_and_other_steps_count() -> None:
    silent = int((~(activations() > 0).any(dim=0)).nonzero()[0])
    assert (
        without_effect(llama(), [Clamp(RUN, silent, 2.0, pole=1), Add(SteeringVector.from_latent(RUN, 3), 1.0)], [TEXT])
        == {}
    )
    # Pushed along its own direction at an earlier layer or its own, a latent fires and can be ablated.
    push = Add(SteeringVector.from_latent(RUN, silent), 60.0, hook_name="blocks.0.hook_resid_post")
    ablate = Ablate(RUN, silent, pole=1)
    assert without_effect(llama(), [ablate], [TEXT]) and kl([ablate]) == 0.0
    changed = abs(kl([ablate], [push])) > 1e-7
    assert bool(without_effect(llama(), [push, ablate], [TEXT])) != changed


@pytest.mark.parametrize("pole", [0, 1, -1])
def test_poles(pole: int) -> None:
    latent = int((activations() > 0).any(dim=0).nonzero()[0])
    found = without_effect(llama(), [Ablate(RUN, latent, pole=pole)], [TEXT])
    assert bool(found) == (pole == -1), "this SAE has no negative activations"
    if found:
        assert reason(Ablate(RUN, latent, pole=pole), found[0]).startswith(f"latent {latent} − fires on no token")
