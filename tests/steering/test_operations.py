"""A steering operation is one class: these are declared here, and are known everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.errors import UserError
from saelab.layout import RECIPE
from saelab.sae.weights import save
from saelab.steering import (
    OPERATIONS,
    Ablate,
    Add,
    Amount,
    Clamp,
    Intervention,
    LatentIntervention,
    ProjectOut,
    Recipe,
    SteeringVector,
    VectorIntervention,
    attach,
)
from saelab.steering.measure.control import random_controls
from saelab.workspace import recipes, steering
from tests.steering.models import HOOK, folder, llama
from tests.steering.test_steering import MASK, RUN, captured, edited, plain, vector

PROMPT = "w5 w6 w70"


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    before = dict(OPERATIONS)
    OPERATIONS.update({"flip": Flip, "reflect": Reflect})
    yield
    OPERATIONS.clear()
    OPERATIONS.update(before)


class Flip(LatentIntervention, operation="flip"):
    """Change the sign of the latent's activation."""

    def change(self, values):
        return -values


@dataclass(frozen=True, eq=False)
class Reflect(VectorIntervention, operation="reflect"):
    """Mirror the component along the direction."""

    amount = Amount("share", "share", default=1.0, largest=2.0, step=0.1)

    vector: SteeringVector
    share: float = 1.0
    offset: float = 0.0

    def prepare(self, like):
        direction = self.vector.direction.to(like)
        return lambda x: x - 2 * self.share * ((x @ direction) - self.offset)[..., None] * direction


OPERATIONS.pop("flip")
OPERATIONS.pop("reflect")  # other tests see the operations of saelab alone

NEW = {"flip": [Flip(RUN, 3), Flip(RUN, 5, pole=1)], "reflect": [Reflect(vector(), 0.75, offset=0.5, where="prompt")]}


def test_it_does_what_it_says() -> None:
    after = captured(llama(), Flip(RUN, 3))[MASK.bool()]
    with torch.no_grad():
        torch.testing.assert_close(after, edited(lambda v: -v, 3), rtol=1e-5, atol=1e-5)
    x, mirrored = (captured(llama(), i)[MASK.bool()] @ vector().direction for i in ([], Reflect(vector())))
    torch.testing.assert_close(mirrored, -x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NEW)
def test_it_generates_and_lives_in_a_recipe(name: str, tmp_path: Path) -> None:
    expected = plain(llama(), interventions=NEW[name])
    assert expected != plain(llama())
    assert expected == plain(llama(), interventions=NEW[name], use_cache=False)
    Recipe.of(llama(), NEW[name]).save(tmp_path / "recipe")
    loaded = Recipe.load(tmp_path / "recipe")
    assert loaded.settings() == [intervention.settings() for intervention in NEW[name]]
    with loaded.attach(llama()):
        assert plain(llama()) == expected


def test_its_conflicts_follow_from_what_it_changes() -> None:
    with attach(llama(), [Flip(RUN, 3, pole=1), Ablate(RUN, 3, pole=-1), Flip(RUN, 4, where="prompt")]):
        pass
    for other in (Ablate(RUN, 3), Clamp(RUN, 3, 1.0, pole=-1)):
        both = attach(llama(), [other, Flip(RUN, 3, pole=1)])
        with pytest.raises(UserError, match=f"{type(other).__name__} and Flip conflict on latent 3"), both:
            pass


@pytest.fixture
def run(tmp_path: Path) -> str:
    save(RUN.sae, tmp_path / "run", {"hook_name": HOOK, "model_name": folder(), "rms_norm": 12.0})
    return str(tmp_path / "run")


def test_the_command_line_offers_it(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["steer", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "flip: Change the sign of the latent's activation." in shown and "reflect: share" in shown
    args = ["steer", run, "--latent", "3", "--prompt", PROMPT, "--max-new-tokens", "2", "--json"]
    main([*args, "--operation", "flip", "--pole", "-"])
    done = json.loads(capsys.readouterr().out)["interventions"][0]
    assert (done["op"], done["latent"], done["pole"]) == ("Flip", 3, -1)
    main([*args, "--operation", "reflect", "--strength", "0.5"])
    assert json.loads(capsys.readouterr().out)["interventions"][0]["share"] == 0.5


def test_the_steering_page_offers_it(tmp_path: Path) -> None:
    latent = steering.pick_latent(RUN, 3, 1)
    texts = steering.pick_vector(vector(), "means")
    assert {"flip", "reflect"} <= set(steering.operations(latent))
    assert "reflect" in steering.operations(texts) and "flip" not in steering.operations(texts)
    with pytest.raises(UserError, match="flip needs a latent"):
        steering.intervention(texts.changed(operation="flip"), RUN)
    picks = [latent.changed(operation="flip"), texts.changed(operation="reflect", amount=0.5)]
    made = [steering.intervention(pick, RUN) for pick in picks]
    assert [type(one) for one in made] == [Flip, Reflect] and made[1].share == 0.5
    assert [type(control) for control in random_controls(made)] == [ProjectOut, Reflect]
    about = recipes.provenance(picks, "prompt", [])
    Recipe.of(llama(), made, provenance=about).save(tmp_path / recipes.RECIPES / "new")
    back = recipes.reopen(tmp_path, "new", RUN)
    assert [(p.operation, p.latent) for p in back] == [("flip", 3), ("reflect", None)] and back[1].amount == 0.5
    (row,) = recipes.saved_recipes(tmp_path)
    assert row["does"] == "Flip #3; Reflect" and row["strength"] == "; share 0.5"


def test_a_name_is_registered_once() -> None:
    for name, operation in (("Other", "flip"), ("Add", "other")):
        with pytest.raises(UserError, match=f"'{operation}' \\({name}\\) is already registered by"):
            type(name, (LatentIntervention,), {}, operation=operation)
    assert OPERATIONS["flip"] is Flip and OPERATIONS["add"] is Add
    again = type("Flip", (LatentIntervention,), {"__qualname__": "Flip", "__module__": __name__}, operation="flip")
    assert OPERATIONS["flip"] is again, "a notebook's cell may be run twice"


def test_what_is_not_registered_acts_but_is_not_saved(tmp_path: Path) -> None:
    class Unnamed(LatentIntervention):
        def change(self, values):
            return values + 1

    class Strange(Intervention):
        d_in = 32

        def _default_hook_name(self):
            return HOOK

        from_settings = on_latent = classmethod(lambda cls: None)

    assert plain(llama(), interventions=Unnamed(RUN, 3)) and Unnamed.operation == "" and Unnamed.summary() == ""
    with pytest.raises(UserError, match='operation="unnamed"'):
        Recipe.of(llama(), Unnamed(RUN, 3)).save(tmp_path / "recipe")
    with pytest.raises(UserError, match="derive it from VectorIntervention"), attach(llama(), Strange()):
        pass


def test_a_recipe_with_an_operation_from_elsewhere_is_refused(tmp_path: Path) -> None:
    path = Recipe.of(llama(), Flip(RUN, 3)).save(tmp_path / "recipe")
    del OPERATIONS["flip"]
    with pytest.raises(UserError, match="'Flip', which is not registered here; update saelab, or import the module"):
        Recipe.load(path)
    text = (path / RECIPE).read_text()
    (path / RECIPE).write_text(text.replace('"Flip"', '"Ablate"').replace('"keep_error"', '"lost"'))
    with pytest.raises(UserError, match=r"is damaged .*keep_error.* get the recipe again"):
        Recipe.load(path)
