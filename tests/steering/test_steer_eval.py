"""The evaluation of steering: answers, proxies, judges good and bad, verdicts, interruptions."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saelab import UserError
from saelab.cli import main
from saelab.features.explanations import ChatClient
from saelab.features.explanations.requests import KeptAnswers
from saelab.sae import build
from saelab.sae.weights import save
from saelab.steering import Add, Recipe, SteeringVector, generate
from saelab.steering.evaluation.answers import Answer, Kept, Row, prompt_ids
from saelab.steering.evaluation.concepts import Concept
from saelab.steering.evaluation.config import SteerEvalConfig
from saelab.steering.evaluation.evaluate import Evaluation
from saelab.steering.evaluation.judge import RUBRICS, check_judge, known_cases, rating, weighted_kappa
from saelab.steering.evaluation.proxies import (
    Reader,
    distinct,
    fluency,
    harmonic_mean,
    topic_similarity,
    train_classifier,
)
from saelab.steering.evaluation.verdicts import Scored, Table
from tests.steering.judge_server import FakeJudge, at_random, constant, fair
from tests.steering.models import D_MODEL, HOOK, folder, llama, tokenizer

CONCEPTS = [
    {"name": "ten", "words": ["w10"], "positive": ["w10 w5 w6", "w7 w10", "w10 w8", "w9 w10 w5"],
     "negative": ["w20 w5 w6", "w7 w21", "w22 w8", "w9 w23 w5"]},
    {"name": "forty", "words": ["w40"], "positive": ["w40 w5 w6", "w7 w40", "w40 w8", "w9 w40 w5"],
     "negative": ["w24 w5 w6", "w7 w25", "w26 w8", "w9 w27 w5"]},
]  # fmt: skip
ASKED = ["w50 w51", "w52 w53 w54", "w55", "w56 w57", "w58 w59 w60", "w61 w62"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE, concepts and instructions, and in ``out`` a finished evaluation, which tests copy."""
    path = tmp_path_factory.mktemp("steer-eval")
    sae = build("topk", d_in=D_MODEL, d_sae=24, k=6).eval()
    save(sae, path / "sae", {"hook_name": HOOK, "model_name": folder(), "rms_norm": 12.0})
    (path / "concepts.json").write_text(json.dumps(CONCEPTS))
    (path / "asked.txt").write_text("\n".join(ASKED))
    main(arguments({name: str(path / name) for name in NAMES}))
    return path


NAMES = ("sae", "concepts.json", "asked.txt", "out")


def arguments(files: dict[str, str], *more: str, out: str = "out") -> list[str]:
    args = ["steer-eval", files["sae"], "--concepts", files["concepts.json"], "--instruction-file", files["asked.txt"]]
    args += ["--instructions", "6", "--max-new-tokens", "6", "--levels", "0.5", "1", "--batch", "7", "--json"]
    return [*args, "--out", str(Path(files["out"]).with_name(out)), *more]


@pytest.fixture
def files(made: Path, tmp_path: Path) -> dict[str, str]:
    """The SAE and the texts, without answers."""
    for name in ("concepts.json", "asked.txt"):
        shutil.copy(made / name, tmp_path / name)
    return {"sae": str(made / "sae"), **{name: str(tmp_path / name) for name in NAMES[1:]}}


@pytest.fixture
def finished(made: Path, files: dict[str, str]) -> dict[str, str]:
    """The same with all answers."""
    shutil.copytree(made / "out", files["out"])
    return files


def evaluate(files: dict[str, str], capsys: Any, *more: str, out: str = "out") -> dict[str, Any]:
    capsys.readouterr()
    main(arguments(files, *more, out=out))
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def judge() -> Iterator[Any]:
    opened: list[FakeJudge] = []

    def make(rate: Any) -> FakeJudge:
        opened.append(FakeJudge(rate))
        return opened[-1]

    yield make
    for fake in opened:
        fake.close()


def test_the_whole_evaluation_offline(finished: dict[str, str]) -> None:
    files, result = finished, json.loads((Path(finished["out"]) / "steer_eval.json").read_text())
    assert result["complete"] and result["scored_by"] == "proxies"
    assert result["answers"] == result["of"] == 6 * (1 + 2 * (3 + 4 * 2))  # unsteered once; prompting has 3 wordings
    lines = [json.loads(line) for line in (Path(files["out"]) / "answers.jsonl").read_text().splitlines()]
    assert len({tuple(line[k] for k in ("concept", "method", "level", "seed", "instruction")) for line in lines}) == 138
    for key, methods in result["calibration"].items():
        assert set(methods) == {"latent", "difference-of-means", "probe", "random"}, key
        for row in methods.values():
            assert [at["reached"] for at in row["levels"]] == [True, True]
            assert [at["damage"] for at in row["levels"]] == pytest.approx([0.15, 0.3], rel=0.051)
    assert {d["reference"] for d in result["differences"]} == {"prompt", "difference-of-means", "random"}
    assert all(d["over"] == "2 concepts" and d["low"] <= d["mean"] <= d["high"] for d in result["differences"])
    assert {row["method"] for row in result["means"]} == {line["method"] for line in lines}
    page = (Path(files["out"]) / "report.html").read_text()
    assert "proxies" in page and "difference-of-means" in page and "<script" in page


def test_an_answer_is_what_the_library_generates_for_its_row_alone(finished: dict[str, str]) -> None:
    files = finished
    calibration = json.loads((Path(files["out"]) / "calibration.json").read_text())
    lines = [json.loads(line) for line in (Path(files["out"]) / "answers.jsonl").read_text().splitlines()]
    options: dict[str, Any] = {"tokenizer": tokenizer(), "max_new_tokens": 6}
    checked = 0
    for line in lines:
        prompt = ASKED[line["instruction"]] + "\n"  # no chat template: plain text
        if line["method"] == "none":
            assert line["text"] == generate(llama(), prompt, **options)
            checked += 1
        elif line["method"] == "latent":
            about = calibration[f"{line['concept']} / 0"]["latent"]["about"]
            vector = SteeringVector.from_latent(files["sae"], int(about.split()[1]))
            assert line["text"] == generate(llama(), prompt, Add(vector, line["strength"]), **options)
            checked += 1
        elif line["method"] == "prompt" and line["level"] == 2:
            system = f"Whatever you are asked, write about {line['concept']} and about nothing else."
            assert line["text"] == generate(llama(), f"{system}\n{prompt}", **options)
            checked += 1
    assert checked == 6 + 2 * 2 * 6 + 2 * 6


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(finished: dict[str, str], capsys: Any) -> None:
    part, files = Path(finished["out"]), finished
    whole = json.loads((part / "steer_eval.json").read_text())
    lines = (part / "answers.jsonl").read_text().splitlines(keepends=True)
    (part / "answers.jsonl").write_text("".join(lines[:60]) + lines[60][:25])  # killed in the middle of a line
    (part / "steer_eval.json").unlink()
    again = evaluate(files, capsys)
    assert again["means"] == whole["means"] and again["differences"] == whole["differences"]
    with pytest.raises(SystemExit):
        evaluate(files, capsys, "--budget", "0.4")
    assert "other settings (config)" in " ".join(capsys.readouterr().err.split())
    (part / "answers.jsonl").write_text("nonsense\n")
    with pytest.raises(SystemExit):
        evaluate(files, capsys)
    assert "damaged in line 1" in " ".join(capsys.readouterr().err.split())


def test_a_fair_judge_is_believed_and_asked_once(finished: dict[str, str], capsys: Any, judge: Any) -> None:
    files = finished
    own = {text: generate(llama(), text + "\n", tokenizer=tokenizer(), max_new_tokens=6) for text in ASKED}
    fake = judge(fair({"ten": "w10", "forty": "w40"}, own))
    fake.delay = 0.05  # so that requests meet, however busy the machine is
    args = ("--endpoint", fake.url, "--judge", "fair")
    result = evaluate(files, capsys, *args)
    assert result["scored_by"] == "fair" and result["cannot_tell"] == {} and result["unreadable"] == 0
    assert {c["rubric"]: c["auc"] for c in result["judge_checks"]} == dict.fromkeys(RUBRICS, 1.0)
    assert all(c["kappa"] == 1.0 for c in result["judge_checks"])
    means = {row["method"]: row for row in result["means"]}
    assert means["none"]["instruction"]["mean"] == 2.0 and means["none"]["fluency"]["mean"] == 2.0
    sent = len(fake.asked)
    assert evaluate(files, capsys, *args)["means"] == result["means"] and len(fake.asked) == sent
    assert 4 <= fake.most <= 16


@pytest.mark.parametrize("bad", [constant, at_random(), lambda *asked: "I would rather not say."])
def test_a_judge_that_cannot_judge_is_not_believed(bad: Any, finished: dict[str, str], capsys: Any, judge: Any) -> None:
    fake = judge(bad)
    result = evaluate(finished, capsys, "--endpoint", fake.url, "--judge", "bad")
    assert set(result["cannot_tell"]) == set(RUBRICS)
    assert all(d["verdict"] == "cannot tell" for d in result["differences"])
    assert len(fake.asked) <= 144  # the thousands of questions that it cannot answer are not asked


def test_an_endpoint_that_fails_or_costs_too_much_loses_nothing(
    finished: dict[str, str], capsys: Any, judge: Any
) -> None:
    files = finished
    own = {text: generate(llama(), text + "\n", tokenizer=tokenizer(), max_new_tokens=6) for text in ASKED}
    fake = judge(fair({"ten": "w10", "forty": "w40"}, own))
    args = ("--endpoint", fake.url, "--judge", "fair")
    with pytest.raises(SystemExit) as stop:
        evaluate(files, capsys, *args, "--max-requests", "50")
    shown = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and "50 requests were sent" in shown and len(fake.asked) == 50
    saved = json.loads((Path(files["out"]) / "steer_eval.json").read_text())
    assert saved["scored_by"] == "proxies" and "50 requests" in saved["judge_stopped"]
    fake.fail_after, fake.failure = 90, 403
    with pytest.raises(SystemExit):
        evaluate(files, capsys, *args)
    assert "answered 403" in " ".join(capsys.readouterr().err.split())
    fake.fail_after = None
    before = len((Path(files["out"]) / "judge.jsonl").read_text().splitlines())
    assert before >= 90
    asked = len(fake.asked)
    result = evaluate(files, capsys, *args)
    assert result["scored_by"] == "fair"
    assert len(fake.asked) - asked == len((Path(files["out"]) / "judge.jsonl").read_text().splitlines()) - before
    with pytest.raises(SystemExit):
        evaluate(files, capsys, "--endpoint", "http://127.0.0.1:9/v1", "--judge", "x", "--timeout", "0")
    assert "timeout" in capsys.readouterr().err


def test_a_recipe_and_named_latents_are_compared(files: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    vector = SteeringVector.from_latent(files["sae"], 3)
    Recipe.of(llama(), Add(vector, 2.0, where="generated"), name="third").save(tmp_path / "recipe")
    args = ["--methods", "latent", "pca", "latent-by-input", "recipe", "--recipe", str(tmp_path / "recipe")]
    args += ["--concept", "ten", "--latent", "ten=-5", "--seeds", "2"]
    save(build("abs_topk", d_in=D_MODEL, d_sae=24, k=6).eval(), tmp_path / "sae2",
         {"hook_name": HOOK, "model_name": folder(), "rms_norm": 12.0})  # fmt: skip
    result = evaluate({**files, "sae": str(tmp_path / "sae2")}, capsys, *args, out="recipe-out")
    known = result["calibration"]["ten / 0"]
    assert known["latent"]["about"] == "latent 5 −" and known["recipe"]["about"] == "third"
    assert known["recipe"]["levels"][1]["damage"] == pytest.approx(0.3, rel=0.051)
    assert {row["method"] for row in result["means"]} == {"none", "latent", "pca", "latent-by-input", "recipe"}


def test_seeds_that_change_no_answer_are_no_sample(files: dict[str, str], capsys: Any) -> None:
    args = ["--methods", "prompt", "latent", "random", "--concept", "ten", "--latent", "ten=5", "--seeds", "3"]
    for row in evaluate(files, capsys, *args)["differences"]:
        if "random" not in (row["method"], row["reference"]):
            assert row["verdict"] == "cannot tell" and row["low"] is None, row
            assert row["score"].endswith("damage") or "the same answers for all 3 seeds" in row["over"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "latant"], "latent"),
        (["--methods", "recipe"], "--recipe FOLDER"),
        (["--methods", "none", "none"], "named twice"),
        (["--concept", "nine"], "no concept 'nine'"),
        (["--instructions", "1"], "at least 2"),
        (["--instructions", "60"], "the file has 6"),
        (["--budget", "0"], "above 0"),
        (["--levels", "2", "1"], "must rise"),
        (["--latent", "ten"], "NAME=NUMBER"),
        (["--latent", "ten=99"], "latents 0 to 23"),
        (["--endpoint", "http://x/v1"], "belong together"),
        (["--max-requests", "3"], "give one"),
        (["--where", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(
    args: list[str], message: str, files: dict[str, str], capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate(files, capsys, *args)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and message in " ".join(shown.split()) and "Traceback" not in shown
    assert not (Path(files["out"]) / "answers.jsonl").exists()


def test_a_concept_with_one_contrast_text_is_refused_at_once(
    files: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "concepts.json").write_text(json.dumps([CONCEPTS[0] | {"positive": ["w10"], "negative": ["w20"]}]))
    with pytest.raises(SystemExit):
        evaluate(files, capsys)
    assert "needs two of each" in " ".join(capsys.readouterr().err.split())


def test_the_reader_gives_the_loss_and_the_activations_of_a_plain_forward() -> None:
    reader = Reader(llama(), tokenizer())
    answers = [[10, 11, 12], [30], [], [40, 41, 42, 43, 44]]
    found = reader.read(ASKED[:4], answers)
    layer = llama().model.layers[2]
    for i, answer in enumerate(answers):
        if not answer:
            assert np.isnan(found.nats[i]) and not found.activations[i].any()
            continue
        prompt = [tokenizer().bos_token_id, *tokenizer()(ASKED[i] + "\n", add_special_tokens=False)["input_ids"]]
        seen: list[Any] = []
        handle = layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        with torch.no_grad():
            logits = llama()(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
        handle.remove()
        hidden = (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).reshape(-1, D_MODEL)
        n = len(answer)
        loss = torch.nn.functional.cross_entropy(logits[-n - 1 : -1], torch.tensor(answer))
        assert found.nats[i] == pytest.approx(float(loss), rel=1e-4)
        np.testing.assert_allclose(found.activations[i], hidden[-n:].mean(0).numpy(), rtol=1e-3, atol=1e-4)
    alone = reader.alone(answers)
    for i, answer in enumerate(answers):
        seen = []
        handle = layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        with torch.no_grad():
            llama()(input_ids=torch.tensor([[tokenizer().bos_token_id, *answer]]))
        handle.remove()
        hidden = (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).reshape(-1, D_MODEL)[1:]
        expected = hidden.mean(0).numpy() if answer else np.zeros(D_MODEL)
        np.testing.assert_allclose(alone[i], expected, rtol=1e-3, atol=1e-4)


def test_proxies_are_their_formulas() -> None:
    assert harmonic_mean(2, 2, 2) == 2 and harmonic_mean(1, 2, 2) == pytest.approx(1.5) and harmonic_mean(0, 2, 2) == 0
    assert distinct([1, 2, 1, 2, 1]) == 0.5 and distinct([1]) == 1.0
    assert fluency(-1.0, [1, 2, 3, 4]) == 2.0 and fluency(float("nan"), []) == 0.0
    assert fluency(0.5, [1, 2, 3, 1, 2, 3]) == pytest.approx(2 * np.exp(-0.5) * 0.75)
    a = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert topic_similarity(a, a[[0, 0, 2]], np.zeros(2)) == pytest.approx([1.0, 0.0, 1.0])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8))
    apart = train_classifier(x[:20] + 3, x[20:])
    assert apart.accuracy.auc > 0.95 and apart.accuracy.balanced > 0.9 and (apart.scores(x[:20] + 3) > 0.5).mean() > 0.9
    same = train_classifier(x[:20], x[20:])
    assert 0.2 < same.accuracy.auc < 0.8  # held out: what it was trained on it would tell apart


def row(method: str, concept: str, level: int, instruction: int, seed: int = 0) -> Row:
    return Row(concept, method, level, seed, instruction, "choose" if instruction % 2 == 0 else "test")


def scored(method: str, concept: str, level: int, c: float, surprise: float, f: float = 2.0) -> list[Scored]:
    own = (c, 2.0, f, harmonic_mean(c, 2.0, f), surprise)
    return [Scored(row(method, concept, level, i), *own) for i in range(4)]


def test_verdicts_choose_the_strength_and_compare_at_equal_damage() -> None:
    rows: list[Scored] = []
    for number, concept in enumerate("abcdef"):
        jitter = 0.01 * number
        rows += scored("none", concept, 0, 0.1, 0.0)
        for level, (c, s, f) in enumerate([(0.5, 0.2, 2.0), (1.0 + jitter, 0.4, 2.0), (2.0, 4.0, 0.1)]):
            rows += scored("latent", concept, level, c, s, f)
        for level, (c, s) in enumerate([(0.4, 0.2), (0.9, 0.4 + jitter)]):
            rows += scored("difference-of-means", concept, level, c, s)
        rows += scored("prompt", concept, 0, 1.9, 9.0)
    found = Table(rows)
    assert found.chosen["a", "latent"] == 1  # not the strongest: its text is broken
    told = {(d.method, d.reference, d.score): d for d in found.differences()}
    better = told["latent", "difference-of-means", "overall"]
    assert better.verdict == "better" and better.concepts == 6 and better.low is not None and better.low > 0
    assert told["latent", "prompt", "overall"].verdict == "worse"
    equal = told["latent", "difference-of-means", "concept at equal damage"]
    # At damage 0.4 + jitter the latent's curve is interpolated between 0.4 and 4.0.
    expected = np.mean([np.interp(0.4 + 0.01 * n, [0.4, 4.0], [1.0 + 0.01 * n, 2.0]) - 0.9 for n in range(6)])
    assert equal.mean == pytest.approx(expected) and equal.short == 0
    assert told["latent", "prompt", "concept at equal damage"].short == 1.0
    unsure = Table(rows, {"concept": "why"})
    assert {d.verdict for d in unsure.differences() if d.score in ("concept", "overall")} == {"cannot tell"}
    assert any(d.verdict != "cannot tell" or d.low == d.high for d in unsure.differences() if d.score == "fluency")
    one = Table([s for s in rows if s.row.concept == "a"])
    assert all(d.verdict == "cannot tell" and d.low is None for d in one.differences())


def test_a_rating_is_read_from_what_models_write() -> None:
    for text, expected in {
        "2": 2, "Rating: 1": 1, "I rate this 0.": 0, "**2**": 2, "1.0": 1, "Rating (0, 1 or 2): 1": 1, "": None,
        "It is about 20 ships": None, "0 would be harsh, so\nRating: 2": 2, "10/10": None, "rating = 0": 0,
        "1/2": 1, "1 out of 2": 1,
    }.items():  # fmt: skip
        assert rating(text) == expected, text


def test_kappa_is_cohens_with_quadratic_weights() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    b[:25] = a[:25]
    expected = cohen_kappa_score(a, b, weights="quadratic")
    assert weighted_kappa(list(zip(a.tolist(), b.tolist()))) == pytest.approx(expected)
    assert weighted_kappa([(2, 2)] * 9) == 0.0 and weighted_kappa([]) == 0.0


def test_a_judge_is_tested_with_few_requests(judge: Any) -> None:
    fake = judge(constant)
    client = KeptAnswers(ChatClient(fake.url, "m", wait=0.0))
    held = [(c["name"], c["positive"], c["negative"]) for c in CONCEPTS]
    asked = [(text, "a b c d e f" + str(i)) for i, text in enumerate(ASKED)]
    checks = check_judge(client, held, asked)  # type: ignore[arg-type]
    assert all(c.auc == 0.5 and not c.passed and "AUC 0.50" in c.reason for c in checks) and client.sent <= 144
    with pytest.raises(UserError, match="more instructions"):
        check_judge(client, held, asked[:2])  # type: ignore[arg-type]


def test_answers_of_several_seeds_to_one_instruction_are_no_case_of_a_wrong_one() -> None:
    held = [(c["name"], c["positive"], c["negative"]) for c in CONCEPTS]
    asked = [(text, f"{text} a b c d e {seed}") for seed in range(5) for text in ASKED]
    for seed in range(20):
        cases = known_cases(held, asked, seed)["instruction"]  # type: ignore[arg-type]
        assert {good for *_, good in cases} == {True, False}
        assert all(text.startswith(f"{asked_for} a") == good for asked_for, text, good in cases)


def test_an_unsteered_answer_without_a_token_has_no_concept(tmp_path: Path) -> None:
    evaluation: Any = Evaluation.__new__(Evaluation)
    evaluation.config, evaluation.instructions = SteerEvalConfig(instructions=2), ASKED[:2]
    evaluation.kept = Kept(tmp_path / "a.jsonl")
    for i, tokens in enumerate([[], [5, 6]]):
        written = Row("", "none", 0, 0, i, evaluation.config.split(i))
        evaluation.kept.add([Answer(written, "", tokens, None, {"topic": 1.0})])
    evaluation.classifiers = {"ten": SimpleNamespace(scores=lambda acts: np.full(len(acts), 0.7))}
    reader: Any = SimpleNamespace(
        read=lambda *_: SimpleNamespace(activations=np.zeros((2, 3)), nats=np.array([np.nan, 1.0])),
        alone=lambda answers: np.zeros((len(answers), 3)),
    )
    evaluation._unsteered(reader, 0)
    found = [answer.proxies["concept ten"] for answer in evaluation.kept.answers.values()]
    assert found == [0.0, pytest.approx(0.7)]  # as in the answers of the methods


def test_answers_survive_a_file(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "a.jsonl")
    kept.add([Answer(row("latent", "a", 1, 2), "text\nmore", [1, 2], 3.5, {"topic": 0.5})])
    again = Kept(tmp_path / "a.jsonl").answers
    assert list(again.values()) == list(kept.answers.values())
    assert Concept("x", ("w",)).vocabulary == ("w",)


def test_an_instruction_goes_through_the_chat_template_with_the_system_text() -> None:
    words = copy.deepcopy(tokenizer())
    words.chat_template = (
        "{% for m in messages %}<s> w4 {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<s> w5 {% endif %}"
    )
    chat = [{"role": "system", "content": "w20 w21"}, {"role": "user", "content": "w50"}]
    expected = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt_ids(words, "w50", "w20 w21") == words(expected, add_special_tokens=False)["input_ids"]
    assert prompt_ids(tokenizer(), "w50", "w20") == [1, 20, 50]  # no template: plain text behind BOS
