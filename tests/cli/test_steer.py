"""``saelab steer`` on a tiny model: what it prints, saves and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saelab.cli import main
from saelab.lm.tokens import token_ids
from saelab.sae import build
from saelab.sae.weights import save
from saelab.steering import (
    OPERATIONS,
    Ablate,
    Add,
    Clamp,
    LatentFires,
    Recipe,
    Schedule,
    SteeringVector,
    at_layers,
    calibrate,
    generate,
    measure_text,
    random_direction,
)
from saelab.steering.measure.passages import Passage
from saelab.steering.measure.silent import without_effect
from tests import tiny_lm
from tests.steering.models import HOOK, folder, llama, tokenizer
from tests.steering.test_steering import RUN

PROMPT = "w5 w6 w70"


@pytest.fixture
def run(tmp_path: Path) -> str:
    save(RUN.sae, tmp_path / "run", {"hook_name": HOOK, "model_name": folder(), "rms_norm": 12.0})
    return str(tmp_path / "run")


def steer(*args: str) -> None:
    main(["steer", *args])


def as_json(capsys, *args: str) -> dict:
    steer(*args, "--json")
    return json.loads(capsys.readouterr().out)


def test_the_command_writes_what_the_library_writes(run: str, capsys) -> None:
    args = [run, "--latent", "3", "--pole", "-", "--strength", "0.5norm", "--prompt", PROMPT, "--compare"]
    result = as_json(capsys, *args, "--max-new-tokens", "6")
    vector = SteeringVector.from_latent(RUN, 3, pole=-1)
    add, options = Add(vector, 6.0), {"tokenizer": tokenizer(), "max_new_tokens": 6}
    (row,) = result["texts"]
    control = row.pop("random_control")
    random = Add(random_direction(vector, 0), 6.0 * control["factor"])
    expected = {
        "prompt": PROMPT,
        "steered": generate(llama(), PROMPT, add, **options),
        "unsteered": generate(llama(), PROMPT, **options),
        "random": generate(llama(), PROMPT, random, **options),
    }
    assert row == expected
    assert expected["steered"] != expected["unsteered"]
    assert result["interventions"][0]["length"] == pytest.approx(6.0)
    ids, written = (token_ids(tokenizer(), text, bos=text == PROMPT) for text in (PROMPT, expected["unsteered"]))
    steered, other = (measure_text(llama(), ids, written, [step]).kl for step in (add, random))
    assert (steered, other) == (pytest.approx(control["kl_steered"]), pytest.approx(control["kl"], rel=1e-4))
    assert control["equal_damage"] and steered == pytest.approx(other, rel=0.05)
    steer(*args, "--max-new-tokens", "6")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"random {' '.join(expected['random'].split())}" in shown
    kl = f"KL {other:.3g} nats per token on the unsteered text, where the steering has {steered:.3g}"
    assert f"random directions, changes of ×{control['factor']:.3g}: {kl}" in shown


def test_where_there_is_no_random_control_the_texts_are_shown_and_the_reason(tmp_path: Path, capsys) -> None:
    sae = build("topk", RUN.sae.d_in, RUN.sae.d_sae, k=4)
    with torch.no_grad():
        sae.W_dec[4] = 0
    save(sae, tmp_path / "run", {"hook_name": HOOK, "model_name": folder(), "rms_norm": 12.0})
    args = [str(tmp_path / "run"), "--latent", "4", "--operation", "ablate", "--prompt", PROMPT, "--compare"]
    result = as_json(capsys, *args, "--max-new-tokens", "3")
    assert "zero" in result["no_random_control"] and "random" not in result["texts"][0]
    steer(*args, "--max-new-tokens", "3")
    shown = " ".join(capsys.readouterr().out.split())
    assert result["texts"][0]["unsteered"].strip() in shown and "no random control: " in shown


def test_strength_is_found_at_a_budget(run: str, capsys) -> None:
    args = [run, "--latent", "3", "--strength", "auto", "--budget-kl", "0.5", "--prompt", PROMPT]
    result = as_json(capsys, *args, "--max-new-tokens", "2")
    vector = SteeringVector.from_latent(RUN, 3).with_units(rms_norm=12.0)
    found = calibrate(llama(), vector, [PROMPT], budget_kl=0.5, tokenizer=tokenizer())
    assert result["interventions"][0]["length"] == pytest.approx(found.strength, rel=1e-4)


def test_the_strength_of_add_is_calibrated_where_none_is_given(run: str, tmp_path: Path, capsys) -> None:
    result = as_json(capsys, run, "--latent", "3", "--prompt", PROMPT, "--max-new-tokens", "2")
    vector = SteeringVector.from_latent(RUN, 3).with_units(rms_norm=12.0)
    found = calibrate(llama(), vector, [PROMPT], budget_kl=0.3, tokenizer=tokenizer())
    assert result["interventions"][0]["length"] == pytest.approx(found.strength, rel=1e-4)
    steer(run, "--latent", "3", "--save", str(tmp_path / "recipe"))  # on sentences of its own
    assert f"of a budget of {0.3:g} nats" in " ".join(capsys.readouterr().err.split())


def test_limits_are_those_of_the_library(run: str, tmp_path: Path, capsys) -> None:
    args = [run, "--latent", "3", "--strength", "9", "--prompt", PROMPT, "--max-new-tokens", "6"]
    args += ["--when-latent", "5", "--when-above", "0.1", "--schedule", "0:1,4:0.5", "--layers", "1-2"]
    result = as_json(capsys, *args, "--save", str(tmp_path / "recipe"))
    condition, schedule = LatentFires(RUN, 5, 0.1), Schedule([(0, 1), (4, 0.5)])
    adds = [Add(SteeringVector.from_latent(RUN, 3), 9.0, when=condition, schedule=schedule)]
    expected = generate(llama(), PROMPT, at_layers(llama(), adds[0], [1, 2]), tokenizer=tokenizer(), max_new_tokens=6)
    assert result["texts"][0]["steered"] == expected
    assert as_json(capsys, str(tmp_path / "recipe"), *args[5:9])["texts"] == result["texts"]
    several = as_json(capsys, run, "--latent", "3", "--prompt", PROMPT, "--max-new-tokens", "1", "--layers", "all")
    alone = as_json(capsys, run, "--latent", "3", "--prompt", PROMPT, "--max-new-tokens", "1")
    assert several["interventions"][0]["length"] < alone["interventions"][0]["length"], "three layers do more damage"


@pytest.mark.parametrize("limits", [["--where", "generated"], ["--schedule", "0:1,3:0"], ["--when-latent"]])
def test_the_strength_is_that_of_the_change_as_it_will_be_made(limits: list[str], run: str, capsys) -> None:
    prompt, new = "w5 w6 w70 w8 w9 w33 w12", 6
    args = [run, "--latent", "3", "--prompt", prompt, "--budget-kl", "0.2", "--max-new-tokens", str(new)]
    ids = torch.tensor([[1, *tokenizer()(prompt, add_special_tokens=False)["input_ids"]]])
    acts = llama()(ids, output_hidden_states=True).hidden_states[2][0, 1:].detach()
    often = int((RUN.sae.encode(acts).dense() > 0).sum(0).argmax())
    limits = [*limits, *([str(often)] if limits == ["--when-latent"] else [])]
    (made,) = as_json(capsys, *args, *limits)["interventions"]
    if "--when-latent" not in limits:  # these act while the model writes: the damage is done to what it wrote
        ids = llama().generate(ids, max_new_tokens=new, do_sample=False)
    start = 8 if "--when-latent" not in limits else 0
    direction = RUN.sae.W_dec[3].detach() / RUN.sae.W_dec[3].norm()

    def damage(length: float) -> float:
        """By a plain hook: KL of the written tokens' distributions, or of all of the prompt's."""

        def change(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            weights = torch.ones(ids.shape[1])
            if "--where" in limits:
                weights[:start] = 0
            elif "--schedule" in limits:
                weights[start:] = torch.tensor([1, 2 / 3, 1 / 3, 0, 0, 0])[: ids.shape[1] - start]
            else:
                fires = RUN.sae.encode(x[0]).dense()[:, often] > 0
                weights = fires.float()
                weights[0] = 0
            return x + weights[:, None] * length * direction

        with torch.no_grad():
            before = llama()(ids).logits[0].double().log_softmax(-1)
            handle = llama().model.layers[1].register_forward_hook(change)
            after = llama()(ids).logits[0].double().log_softmax(-1)
            handle.remove()
        kl = (before.exp() * (before - after)).sum(-1)
        return float(kl[start - 1 : -1].mean() if start else kl.mean())

    # The bracket is narrower than two per cent of the strength.
    assert damage(made["length"]) <= 0.2001 < damage(1.03 * made["length"])


def test_a_condition_that_never_holds_calibrates_nothing(run: str, capsys) -> None:
    for limits, said in (
        (["--when-latent", "5", "--when-above", "1e6"], "latent 5 never fires above --when-above on the prompts"),
        (["--where", "answer"], "messages of a chat"),
    ):
        with pytest.raises(SystemExit):
            steer(run, "--latent", "3", *limits, "--prompt", PROMPT)
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("operation", ["scale", "clamp", "min-clamp", "ablate", "project-out", "cap"])
def test_every_operation_runs_and_is_shown(operation: str, run: str, capsys) -> None:
    number = ["--strength", "9"] if OPERATIONS[operation].amount else []
    steer(run, "--latent", "3", "--operation", operation, *number, "--prompt", PROMPT, "--max-new-tokens", "3")
    shown = capsys.readouterr().out
    assert "steered" in shown and PROMPT in shown


def silent_on(text: str) -> int:
    """A latent that fires on no token of a text and of what is written after it."""
    ids = [
        *token_ids(tokenizer(), text),
        *token_ids(tokenizer(), generate(llama(), text, tokenizer=tokenizer(), max_new_tokens=6), bos=False),
    ]
    passage = [Passage(ids, [])]
    return next(n for n in range(RUN.sae.d_sae) if without_effect(llama(), [Ablate(RUN, n, pole=1)], passage))


def test_an_ablation_of_a_silent_latent_says_why_nothing_changed(run: str, tmp_path: Path, capsys) -> None:
    latent = silent_on(PROMPT)
    args = [run, "--latent", str(latent), "--operation", "ablate", "--prompt", PROMPT, "--max-new-tokens", "6"]
    result = as_json(capsys, *args, "--compare")
    assert result["texts"][0]["steered"] == result["texts"][0]["unsteered"]
    assert result["texts"][0]["random_control"]["kl_steered"] == 0
    steer(*args, "--compare")
    shown = " ".join(capsys.readouterr().out.split())
    assert "the steering does no damage to the unsteered text, so the control keeps its lengths" in shown
    (said,) = result["without_effect"]
    assert said.startswith(f"ablate changes nothing here, because latent {latent} fires on no token that it acts on")
    assert "saelab index RUN --cache CACHE" in said
    steer(*args, "--save", str(tmp_path / "recipe"))
    assert "changes nothing here" in " ".join(capsys.readouterr().out.split())
    assert as_json(capsys, str(tmp_path / "recipe"), "--prompt", PROMPT, "--max-new-tokens", "6")["without_effect"]
    for fires in (["--operation", "clamp", "--strength", "2"], ["--strength", "3"]):
        assert "without_effect" not in as_json(capsys, run, "--latent", str(latent), *fires, "--prompt", PROMPT)


def test_a_recipe_is_saved_and_applied_again(run: str, tmp_path: Path, capsys) -> None:
    args = ["--prompt", PROMPT, "--prompt", "w8 w9", "--max-new-tokens", "5"]
    saved, gguf = str(tmp_path / "recipe"), str(tmp_path / "vector.gguf")
    first = as_json(capsys, run, "--latent", "3", "--strength", "8", *args, "--save", saved, "--gguf", gguf)
    again = as_json(capsys, saved, *args)
    assert again["texts"] == first["texts"] and len(again["texts"]) == 2
    assert Recipe.load(saved).name == "latent 3"
    assert Path(gguf).read_bytes()[:4] == b"GGUF"


def test_logits_are_attributed(run: str, capsys) -> None:
    args = [run, "--latent", "3", "--strength", "8", "--prompt", PROMPT, "--max-new-tokens", "3", "--attribute"]
    rows = as_json(capsys, *args)["attribution"]
    assert len(rows) == 3
    for row in rows:
        total = row["steered"] + row["other_latents"] + row["error_term"] + row["gap"]
        assert total == pytest.approx(row["change"], abs=1e-3)
    steer(*args)
    assert "others" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--latent", "64", "--prompt", PROMPT], "latent 64 does not exist: the SAE has latents 0 to 63"),
        (["--latent", "3", "--strength", "3x", "--prompt", PROMPT], "saelab index"),
        (["--latent", "3", "--strength", "much", "--prompt", PROMPT], "is not a number"),
        (["--latent", "3", "--pole", "north", "--strength", "1", "--prompt", PROMPT], "neither + nor -"),
        (["--prompt", PROMPT], "--latent 12"),
        (["--latent", "3", "--strength", "1"], "nothing to do"),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--chat"], "no chat template"),
        (["--latent", "3", "--operation", "scale", "--strength", "2norm", "--prompt", PROMPT], "takes a factor"),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--model", "./nowhere"], "does not exist"),
        (
            ["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--hook", "blocks.9.hook_out"],
            "the model has 3 blocks",
        ),
        (
            ["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--hook", "blocks.1.hook_resid_mid"],
            "cannot be replaced",
        ),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--temperature", "nan"], "temperature=nan"),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--max-new-tokens", "-3"], "max_new_tokens=-3"),
        (["--latent", "3", "--strength", "auto", "--prompt", PROMPT, "--budget-kl", "nan"], "the budget nan"),
        (["--latent", "3", "--strength", "1", "--save", "/dev/null/recipe"], "cannot be written: /dev/null is a file"),
        (["--latent", "3", "--strength", "1", "--gguf", "/dev/null/a.gguf"], "cannot be written: /dev/null is a file"),
        (["--latent", "3", "--strength", "1", "--gguf", "."], "is a folder; --gguf names a file"),
        (["--latent", "3", "--operation", "ablate", "--gguf", "never.gguf"], "can only add; Ablate"),
        (["--latent", "3", "--strength", "1", "--save", "never", "--attribute"], "give --prompt"),
        (["--latent", "3", "--strength", "1", "--save", "never", "--compare"], "give --prompt"),
        (["--latent", "3", "--operation", "ablate", "--strength", "9", "--prompt", PROMPT], "ablate takes no number"),
        (["--latent", "3", "--operation", "project-out", "--strength", "1max", "--prompt", PROMPT], "takes a fraction"),
        (["--latent", "3", "--operation", "clamp", "--strength", "auto", "--prompt", PROMPT], "--operation add only"),
        (["--latent", "3", "--operation", "flop", "--strength", "1", "--prompt", PROMPT], "invalid choice 'flop'"),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--top-p", "0"], "top_p=0.0"),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--when-above", "1"], "name the latent"),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--when-latent", "64"], "latent 64 does not exist"),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--schedule", "0=1"], "TOKEN:WEIGHT"),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--layers", "a"], "--layers 'a' is neither"),
        (["--latent", "3", "--strength", "1", "--prompt", PROMPT, "--layers", "1-3"], "layer 3 does not exist"),
        (["--latent", "3", "--operation", "ablate", "--prompt", PROMPT, "--layers", "1"], "whose SAE has one layer"),
        (
            ["--latent", "3", "--strength", "1", "--budget-kl", "0.1", "--prompt", "w1"],
            "--budget-kl limits the damage of --strength auto",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(args: list[str], message: str, run: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        steer(run, *args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error.replace("\n", " ") and "Traceback" not in error
    assert not Path("never").exists() and not Path("never.gguf").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latent", "3"], "a recipe has its own latent; leave out --latent"),
        (["--pole", "-"], "leave out --pole"),
        (["--operation", "ablate"], "leave out --operation"),
        (["--strength", "2"], "leave out --strength"),
        (["--where", "prompt"], "leave out --where"),
        (["--hook", HOOK], "leave out --hook"),
        (["--when-latent", "3"], "leave out --when-latent"),
        (["--layers", "all"], "leave out --layers"),
        (["--attribute"], "steer from a run folder"),
    ],
)
def test_what_a_recipe_decides_is_not_silently_ignored(
    options: list[str], message: str, run: str, tmp_path: Path, capsys
) -> None:
    steer(run, "--latent", "3", "--strength", "8", "--save", str(tmp_path / "recipe"))
    with pytest.raises(SystemExit) as stop:
        steer(str(tmp_path / "recipe"), "--prompt", PROMPT, *options)
    assert stop.value.code == 2 and message in capsys.readouterr().err.replace("\n", " ")


def test_the_number_of_an_operation_is_used_or_its_default(run: str, capsys) -> None:
    args = [run, "--latent", "3", "--prompt", PROMPT, "--max-new-tokens", "1"]
    half = as_json(capsys, *args, "--operation", "project-out", "--strength", "0.5")["interventions"][0]
    assert half["strength"] == 0.5
    for operation, number in (("project-out", {"strength": 1.0}), ("scale", {"factor": 2.0})):
        found = as_json(capsys, *args, "--operation", operation)["interventions"][0]
        assert number.items() <= found.items()


def test_a_recipe_is_replaced_only_when_asked(run: str, tmp_path: Path, capsys) -> None:
    args = [run, "--latent", "3", "--strength", "8", "--save", str(tmp_path / "recipe")]
    steer(*args)
    with pytest.raises(SystemExit):
        steer(*args)
    assert "--overwrite" in capsys.readouterr().err
    steer(*args[:-3], "5", *args[-2:], "--overwrite")
    assert Recipe.load(tmp_path / "recipe").interventions[0].length == 5.0


@pytest.mark.parametrize("damage", ["strength", "model", "vectors_sha256", "list", "not json"])
def test_a_damaged_recipe_is_one_line(damage: str, run: str, tmp_path: Path, capsys) -> None:
    steer(run, "--latent", "3", "--strength", "8", "--save", str(tmp_path / "recipe"))
    path = tmp_path / "recipe" / "recipe.json"
    content = json.loads(path.read_text())
    for part in (content, content["interventions"][0]):
        part.pop(damage, None)
    path.write_text({"list": "[1]", "not json": "{"}.get(damage, json.dumps(content)))
    with pytest.raises(SystemExit) as stop:
        steer(str(tmp_path / "recipe"), "--prompt", PROMPT)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "get the recipe again" in error and "Traceback" not in error


def test_conflicts_and_other_models_in_a_recipe_are_one_line(run: str, tmp_path: Path, capsys) -> None:
    both = [Clamp(RUN, 3, 1.0, where="prompt"), Ablate(RUN, 3, where="generated")]
    Recipe.of(llama(), both).save(tmp_path / "recipe")
    path = tmp_path / "recipe" / "recipe.json"
    path.write_text(path.read_text().replace('"prompt"', '"all"'))
    other = str(tiny_lm.save_llama(tmp_path / "other"))
    for model, message in ((folder(), "Clamp and Ablate conflict on latent 3"), (other, "this model has")):
        with pytest.raises(SystemExit) as stop:
            steer(str(tmp_path / "recipe"), "--prompt", PROMPT, "--model", model)
        error = capsys.readouterr().err.replace("\n", " ")
        assert stop.value.code == 2 and message in error and "Traceback" not in error


def test_an_sae_of_another_width_is_refused(run: str, tmp_path: Path, capsys) -> None:
    from saelab.sae import build

    torch.manual_seed(0)
    save(build("topk", d_in=16, d_sae=32, k=4), tmp_path / "wide", {"hook_name": HOOK, "model_name": folder()})
    with pytest.raises(SystemExit):
        steer(str(tmp_path / "wide"), "--latent", "3", "--strength", "1", "--prompt", PROMPT)
    assert "width 16" in capsys.readouterr().err


def test_a_concept_chooses_its_latent_and_says_why(run: str, tmp_path: Path, capsys) -> None:
    result = as_json(capsys, run, "--concept", "w10, w11", "--prompt", PROMPT, "--max-new-tokens", "2")
    choice = result["choice"]["candidates"][0]
    assert result["interventions"][0]["op"] == "Add" and result["interventions"][0]["length"] > 0
    assert choice["effect"] >= max(c["effect"] for c in result["choice"]["candidates"])
    texts = [{"name": "ten", "words": ["w10"], "positive": ["w10 w5", "w10 w6"], "negative": ["w7 w5", "w8 w6"]}]
    file = tmp_path / "concepts.json"
    file.write_text(json.dumps(texts))
    steer(run, "--concept", "ten", "--concepts", str(file))  # no prompt: the candidates are listed
    shown = capsys.readouterr()
    assert "chose latent" in shown.err and "contrast texts" in shown.err and "random" in shown.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--concept", "w10", "--latent", "3"], "--latent 12"),
        (["--concept", " , "], "the concept is empty"),
        (["--latent", "3", "--concepts", "x.json"], "give --concept"),
        (["--concept", "w10", "--concepts", "missing.json"], "missing.json"),
    ],
)
def test_a_concept_that_is_wrong_is_refused(args: list[str], message: str, run: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        steer(run, *args, "--prompt", PROMPT)
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
