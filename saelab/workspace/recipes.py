"""Recipes that the Steering page saves in a folder: list them, and load one again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from saelab.errors import MALFORMED, UserError, first_line
from saelab.layout import RECIPE
from saelab.lm.hook_names import any_layer, layer_of
from saelab.runs import Run
from saelab.steering import OPERATIONS, DoseResponse, Intervention, LatentIntervention, Recipe, VectorIntervention
from saelab.steering.vectors import SteeringVector, parse_strength
from saelab.workspace.steering import Pick, pick_latent, pick_vector

RECIPES = "recipes"
RESERVED = re.compile("con|prn|aux|nul|(com|lpt)[0-9¹²³]", re.IGNORECASE)  # names of devices on Windows


def recipe_folder(root: Path, name: str) -> Path:
    """Where a recipe of this name is saved; the name may only be a plain word, so it cannot leave the folder."""
    slug = re.sub(r"[^\w-]+", "-", name.strip()).strip("-_")
    if not slug:
        raise UserError("give the recipe a name of letters, digits or dashes")
    if RESERVED.fullmatch(slug):
        slug = f"recipe-{slug}"
    return root / RECIPES / slug[:80]


def saved_recipes(root: Path) -> list[dict[str, Any]]:
    """Name, what it does, where its vectors come from, and its measured doses, for every recipe in the folder."""
    rows = []
    for path in sorted((root / RECIPES).glob(f"*/{RECIPE}")):
        if not all(file.resolve().is_relative_to(root.resolve()) for file in path.parent.iterdir()):
            continue
        try:
            rows.append(_row(path.parent.name, json.loads(path.read_bytes())))
        except MALFORMED as error:
            # One damaged recipe must not hide the others.
            rows.append({"folder": path.parent.name, "name": path.parent.name, "does": f"damaged: {first_line(error)}"})
    return rows


def _row(folder: str, content: dict[str, Any]) -> dict[str, Any]:
    parts, about = [_part(entry) for entry in content["interventions"]], content.get("provenance") or {}
    return {
        "folder": folder,
        "name": content.get("name") or folder,
        "does": "; ".join(part["does"] for part in parts),
        "origin": "; ".join(part["origin"] for part in parts),
        "strength": "; ".join(part["strength"] for part in parts),
        "norm": parts[0]["norm"] if parts else None,
        "promotes": " ".join(about.get("promotes", [])),
        "model": (content.get("model") or {}).get("name"),
        "verdict": ": ".join(filter(None, (_measured_on(about), about.get("verdict", "")))),
        "doses": about.get("doses", []),
    }


def _measured_on(about: dict[str, Any]) -> str:
    words = ", ".join(f"‘{word}’" for word in about.get("words", []))
    return " on ".join(filter(None, (about.get("measured"), words)))


def provenance(picks: Sequence[Pick], prompt: str, promotes: Sequence[str]) -> dict[str, Any]:
    """The state of the page that a recipe records: picks, prompt, logit effect."""
    return {
        "prompt": prompt,
        "promotes": list(promotes),
        "picks": [{"label": p.label, "operation": p.operation, "amount": p.amount, "unit": p.unit} for p in picks],
    }


def measured(found: DoseResponse, of: str, words: Sequence[str]) -> dict[str, Any]:
    """What a recipe records of the doses and responses of the pick with the label ``of``, on ``words``."""
    doses = [asdict(dose) for dose in found.doses]
    return {"measured": of, "words": list(words), "verdict": found.verdict, "doses": doses}


def reopen(root: Path, folder: str, source: Run) -> list[Pick]:
    """The picks of a saved recipe, to work on with ``source``.

    Vectors come from the recipe itself; operations on latents need the SAE they were saved with. Raises UserError
    for another hook point or another SAE.
    """
    recipe = Recipe.load(root / RECIPES / folder)
    told = recipe.provenance.get("picks", [])
    picks, own = [], source.hook_name_out
    for i, (step, hooks) in enumerate(_by_change(recipe.interventions)):
        # The same place of other blocks is one change at several layers.
        if step.hook_name != own and (
            any_layer(step.hook_name) != any_layer(own) or isinstance(step, LatentIntervention)
        ):
            raise UserError(f"{folder} acts at {step.hook_name}, this SAE writes at {own}; choose another SAE")
        label = told[i]["label"] if i < len(told) else f"{folder} {i + 1}"
        layers = "" if hooks == [own] else ",".join(str(layer_of(hook)) for hook in hooks)
        picks.append(_pick(step, label, folder, source).changed(layers=layers))
    return picks


def _by_change(steps: Sequence[Intervention]) -> list[tuple[Intervention, list[str]]]:
    """Steps that follow each other and differ by their layer alone, as one of them and all hook points."""
    found: list[tuple[Intervention, list[str]]] = []
    for step in steps:
        if found and _same_change(found[-1][0], step):
            found[-1][1].append(step.hook_name)
        else:
            found.append((step, [step.hook_name]))
    return found


def _same_change(one: Intervention, other: Intervention) -> bool:
    first, second = (step.settings() | {"hook_name": any_layer(step.hook_name)} for step in (one, other))
    return (
        isinstance(one, VectorIntervention)
        and one.hook_name != other.hook_name
        and first == second
        and len(one.directions) == len(other.directions)
        and all(torch.equal(a.direction, b.direction) for a, b in zip(one.directions, other.directions))
    )


def saved_prompt(root: Path, folder: str) -> str:
    """The prompt that a recipe was saved with; empty where it has none."""
    return str(Recipe.load(root / RECIPES / folder).provenance.get("prompt") or "")


def _pick(step: Intervention, label: str, folder: str, source: Run) -> Pick:
    number: Any = getattr(step, step.amount.field) if step.amount else None
    units = step.amount is not None and step.amount.units
    common: dict[str, Any] = {"operation": step.operation, "where": step.where}
    common |= {"when": step.when, "schedule": step.schedule}
    for field in dataclasses.fields(step):  # where they differ from the defaults, which other operations do not share
        if field.name in ("skip_first", "keep_error") and getattr(step, field.name) != field.default:
            common[field.name] = getattr(step, field.name)
    if isinstance(step, LatentIntervention):
        if step.run.fingerprint != source.fingerprint:
            raise UserError(f"{folder} changes latents of another SAE; choose the run it was saved from")
        pick = pick_latent(source, step.latent, step.pole or 1).changed(**common)
        if units:
            activation = abs(step.activation(number, step.pole or 1))
            number = round(activation * pick.vector.norm / pick.vector.length(f"1{pick.unit}"), 4)
    else:
        vector, *others = step.directions
        if others:
            raise UserError(
                f"{folder} acts along {1 + len(others)} vectors in one step, which this page cannot show; apply it "
                "with saelab steer"
            )
        pick = _vector_pick(vector, label, source).changed(**common)
        if units:
            return _sized(pick, number)
    return pick if number is None else pick.changed(amount=float(number), start=float(number))


def _vector_pick(vector: SteeringVector, label: str, source: Run) -> Pick:
    """A vector; a latent again where it is exactly that latent of this SAE."""
    origin = vector.origin
    if origin.get("kind") == "latent" and origin.get("sae_sha256") == source.fingerprint:
        return pick_latent(source, origin["latent"], origin.get("pole", 1))
    return pick_vector(vector, label)


def _sized(pick: Pick, strength: float | str) -> Pick:
    number, unit = parse_strength(strength)
    if unit:
        return pick.changed(amount=number, start=number, unit=unit)
    number = number / pick.vector.norm
    return pick.changed(amount=number, start=number, unit="raw")


def _part(entry: dict[str, Any]) -> dict[str, Any]:
    vectors = entry.get("vectors") or []
    amount = next((cls.amount for cls in OPERATIONS.values() if cls.__name__ == entry["op"]), None)
    number = None if amount is None else entry.get(amount.field)
    named = "" if amount is None or amount.field == "strength" else f"{amount.field} "
    strength = "" if number is None else f"{named}{_short(number)}"
    latent = f" #{entry['latent']}" if "latent" in entry else ""
    origins = [v.get("origin") or {} for v in vectors] or [entry.get("source") or {}]
    kinds = [f"{o.get('kind', 'latent')} {o.get('latent', '')}".strip() for o in origins]
    norm = vectors[0].get("norm") if vectors else None
    does = f"{entry['op']}{latent}"
    return {"does": does, "strength": strength, "origin": ", ".join(kinds), "norm": norm}


def _short(amount: Any) -> str:
    return f"{amount:.4g}" if isinstance(amount, float) else str(amount)
