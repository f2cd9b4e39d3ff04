"""``saelab steer --chat``: questions, turns and a conversation on the standard input, on a tiny model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from saelab.cli import main
from saelab.lm import load_hf_model
from saelab.sae import build
from saelab.sae.weights import save
from saelab.steering import Add, Chat, Run, SteeringVector, answer_chats
from tests import tiny_lm
from tests.data.test_chat import CHATML

HOOK = "blocks.1.hook_resid_post"
ASKED = ["the cat sat", "rain fell"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny_lm.save_llama(folder / "model", hidden_size=32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.save_pretrained(folder / "model")
    sae = build("topk", d_in=32, d_sae=64, k=8).eval()
    save(sae, folder / "run", {"hook_name": HOOK, "model_name": str(folder / "model"), "rms_norm": 12.0})
    return folder / "run"


def chat(run: Path, capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    options = ["--latent", "3", "--strength", "60", "--where", "answer", "--max-new-tokens", "5"]
    main(["steer", str(run), *options, "--chat", "--system", "old roofs", "--json", *args])
    return json.loads(capsys.readouterr().out)


def expected(run: Path) -> tuple[Chat, list[str]]:
    model = load_hf_model(run.parent / "model", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "model")
    add = Add(SteeringVector.from_latent(Run.open(run), 3), 60.0, where="answer")
    talk = Chat(model, add, system="old roofs", tokenizer=tokenizer, max_new_tokens=5)
    opened = [[{"role": "system", "content": "old roofs"}, {"role": "user", "content": text}] for text in ASKED]
    alone = answer_chats(model, opened, add, tokenizer=tokenizer, max_new_tokens=5)
    for text in ASKED:
        talk.say(text)
    return talk, alone


def test_questions_turns_and_a_conversation(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, alone = expected(run)
    prompts = [part for text in ASKED for part in ("--prompt", text)]
    assert [row["steered"] for row in chat(run, capsys, *prompts)["texts"]] == alone
    both = chat(run, capsys, *prompts, "--turns", "--compare")
    assert both["messages"] == talk.messages and both["unsteered"] != talk.messages
    control = both["random_control"]  # so strong a change cannot be matched
    assert control["equal_damage"] == (abs(control["kl"] / control["kl_steered"] - 1) < 0.05) and control["kl"] > 0.1
    asked = [message for message in both["random"] if message["role"] != "assistant"]
    assert asked == [message for message in talk.messages if message["role"] != "assistant"]
    for row in chat(run, capsys, *prompts, "--compare")["texts"]:
        assert row["steered"] in alone and row["random_control"]["kl"] > 0 and "random" in row
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*ASKED, "", ""])))
    assert chat(run, capsys)["messages"] == talk.messages


def test_a_conversation_is_shown_as_it_is_written(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, _ = expected(run)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(ASKED)))
    options = ["--latent", "3", "--strength", "60", "--where", "answer", "--max-new-tokens", "5"]
    main(["steer", str(run), *options, "--chat", "--system", "old roofs"])
    shown = capsys.readouterr().out
    main(["steer", str(run), *options, "--chat", "--system", "old roofs", "--turns", "--prompt", ASKED[0]])
    assert "user" in capsys.readouterr().out
    for message in talk.messages:
        if message["role"] == "assistant" and message["content"].isascii() and message["content"].isprintable():
            assert message["content"] in shown
    assert shown.count("\n") >= len(ASKED)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--system", "x", "--prompt", "a"], "add --chat"),
        (["--turns", "--prompt", "a"], "add --chat"),
        (["--chat", "--turns"], "--turns needs the messages"),
        (["--chat", "--prompt", "a", "--attribute"], "leave out --chat"),
        (["--where", "answer", "--prompt", "the cat"], "means messages of a chat"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, run: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["steer", str(run), "--latent", "3", "--strength", "1", *args])
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and message in error and "Traceback" not in error
