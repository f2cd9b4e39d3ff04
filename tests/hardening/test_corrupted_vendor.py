"""One wrong byte in the files of an SAE, of ours or of another tool, or of a recipe: one line, or finite numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saelab import inspect, load
from saelab.errors import UserError
from saelab.layout import CONFIG, EXTRA, WEIGHTS
from saelab.sae import SAE, build
from saelab.sae.weights import save
from saelab.steering import Add, Clamp, ProjectOut, Recipe
from tests.hardening.vendors import D_IN, D_SAE, VENDORS
from tests.steering.models import llama
from tests.steering.test_steering import RUN, vector

FLIPS = 60  # places a file, besides its ends


def damaged(path: Path, seed: str) -> Iterator[int]:
    """``path`` with one byte changed, at one place after the other; whole again afterwards."""
    whole, rng = path.read_bytes(), random.Random(seed)
    places = {*range(8), *range(len(whole) - 8, len(whole)), *(rng.randrange(len(whole)) for _ in range(FLIPS))}
    for position in sorted(place for place in places if 0 <= place < len(whole)):
        broken = bytearray(whole)
        broken[position] ^= rng.choice([0x01, 0x10, 0x40, 0x80, 0xFF])
        path.write_bytes(broken)
        yield position
    path.write_bytes(whole)


def sound(sae: SAE) -> None:
    assert (sae.d_in, sae.d_sae - 2 * (sae.variant == "normalised")) == (D_IN, D_SAE)
    for name, value in sae.state_dict().items():
        assert value.isfinite().all(), name
    sae(torch.ones(2, D_IN))


def survives(path: Path, file: Path, seed: str) -> None:
    """The SAE at ``path`` with any byte of its ``file`` changed is refused in one line, or sound."""
    refused = 0
    for position in damaged(file, seed):
        try:
            sound(load(path))
            inspect(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), (position, error)
    assert refused, f"no flipped byte of {file.name} was noticed"


@pytest.mark.filterwarnings("ignore")  # a wrong number may well overflow somewhere
@pytest.mark.parametrize("form", VENDORS)
def test_a_flipped_byte_in_another_tools_sae(form: str, tmp_path: Path) -> None:
    path = VENDORS[form](tmp_path / "sae")
    sound(load(path))
    for file in sorted(p for p in (tmp_path / "sae").rglob("*") if p.is_file()):
        survives(path, file, f"{form}/{file.name}")
    sound(load(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["batch_topk", "feature_choice", "gated", "jump_relu", "matching_pursuit"])
def test_a_flipped_byte_in_what_lies_beside_the_weights(variant: str, tmp_path: Path) -> None:
    size = {"batch_topk": {"k": 2}, "feature_choice": {"k": 2}, "matching_pursuit": {"n_steps": 2}}
    save(build(variant, D_IN, D_SAE, **size.get(variant, {})), tmp_path)
    for name in (EXTRA, CONFIG, WEIGHTS):
        survives(tmp_path, tmp_path / name, f"{variant}/{name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    sae = build("topk", D_IN, D_SAE, k=2)
    sae.b_dec.data[1] = value
    save(sae, tmp_path)
    with pytest.raises(UserError, match="b_dec has NaN or infinite entries"):
        load(tmp_path)


def test_a_pursuit_that_would_never_stop_is_refused(tmp_path: Path) -> None:
    sae = build("matching_pursuit", D_IN, D_SAE, n_steps=2)
    sae.residual_stop.fill_(-1)
    save(sae, tmp_path)
    with pytest.raises(UserError, match=r"residual_stop=-1\.0 must be 0 or more"):
        load(tmp_path)(torch.ones(2, D_IN))


@pytest.mark.parametrize("place", ["flags", "method"])
def test_an_archive_that_declares_its_entries_unreadable(place: str, tmp_path: Path) -> None:
    """A wrong bit in the directory of an ``.npz``: an encrypted entry, an unknown way of packing."""
    path = VENDORS["gemma_scope"](tmp_path / "sae")
    content = bytearray((path / "params.npz").read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + (8 if place == "flags" else 10)] ^= 1
    (path / "params.npz").write_bytes(content)
    with pytest.raises(UserError, match="not a readable npz file"):
        load(path)


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_byte_in_a_recipe(tmp_path: Path) -> None:
    parts = [Add(vector(), 9.0, where="generated"), ProjectOut([vector(1)]), Clamp(RUN, 11, 7.0, where=[1, -1])]
    whole = Recipe.of(llama(), parts, name="parts")
    whole.save(tmp_path / "recipe")
    for file in sorted(p for p in (tmp_path / "recipe").rglob("*") if p.is_file()):
        refused = 0
        for position in damaged(file, file.name):
            try:
                recipe = Recipe.load(tmp_path / "recipe")
            except UserError as error:
                refused += 1
                assert "\n" not in str(error), (position, error)
                continue
            # A number or a name in the description may be another one; tensors are covered by hashes.
            assert len(recipe.settings()) == len(parts)
            assert torch.equal(recipe.interventions[0].vector.direction, vector().direction)
            assert torch.equal(recipe.interventions[2].sae.W_dec, RUN.sae.W_dec)
        assert refused, f"no flipped byte of {file.name} was noticed"
