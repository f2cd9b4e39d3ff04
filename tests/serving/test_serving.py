"""The server as other people's programs see it: asked by the ``openai`` package, over a real socket."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from saelab.cli import main  # noqa: E402
from saelab.lm import load_model  # noqa: E402
from saelab.serving import Served, application  # noqa: E402
from saelab.serving.protocol import Request, StopTexts  # noqa: E402
from saelab.serving.server import Answer, _usage, bound  # noqa: E402
from saelab.steering import Add, Recipe, SteeringVector, answer_chats  # noqa: E402
from tests import tiny_lm  # noqa: E402
from tests.data.test_chat import CHATML  # noqa: E402

ASKED: list[Any] = [{"role": "system", "content": "old roofs"}, {"role": "user", "content": "the cat sat"}]
NEW = 8


def add(strength: float = 60.0) -> Add:
    direction = torch.randn(16, generator=torch.Generator().manual_seed(5))
    return Add(SteeringVector.from_tensor(direction, "blocks.1.hook_resid_post"), strength, where="answer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    tiny_lm.save_llama(root / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(root / "tiny")
    tokenizer.chat_template = (
        CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if calm %}calm {% endif %}{% endif %}"
    )
    tokenizer.save_pretrained(root / "tiny")
    model = load_model(root / "tiny", device="cpu")
    Recipe.of(model, add()).save(root / "sea")
    Recipe.of(model, [add(-80.0)]).save(root / "land")
    return root


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    model = load_model(folder / "tiny", device="cpu")
    return Served(model, {name: Recipe.load(folder / name) for name in ("sea", "land")}, "tiny")


@pytest.fixture(scope="module")
def address(served: Served) -> Iterator[str]:
    listener = bound(0)
    server = uvicorn.Server(uvicorn.Config(application(served), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(timeout=20)
    listener.close()


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


def ask(client: Any, model: str = "sea", **options: Any) -> Any:
    return client.chat.completions.create(
        model=model, **{"messages": ASKED, "temperature": 0, "max_tokens": NEW} | options
    )


def expected(served: Served, *steps: Add, messages: Any = ASKED, **options: Any) -> str:
    return answer_chats(served.model, [messages], list(steps), **{"max_new_tokens": NEW} | options)[0]


def text(answer: Any) -> str:
    return answer.choices[0].message.content


def test_each_recipe_answers_by_its_name_and_strength(client: Any, served: Served) -> None:
    assert [model.id for model in client.models.list()] == ["sea", "land", "tiny"]
    assert client.models.retrieve("sea@0.5").id == "sea@0.5"
    steered = {
        "sea": [add()],
        "land": [add(-80.0)],
        "tiny": [],
        "sea@0.5": [add(30.0)],
        "sea@0": [],
        "land@-1": [add(80.0)],
    }
    texts = {name: text(ask(client, name)) for name in steered}
    assert texts == {name: expected(served, *steps) for name, steps in steered.items()}
    assert len(set(texts.values())) >= 4
    assert text(ask(client, extra_body={"strength": 0.5})) == texts["sea@0.5"]
    parts = [
        ASKED[0],
        {"role": "user", "content": [{"type": "text", "text": "the cat"}, {"type": "text", "text": " sat"}]},
    ]
    assert text(ask(client, messages=parts)) == texts["sea"]


def test_an_answer_says_what_it_is(client: Any, served: Served) -> None:
    answer = ask(client)
    prompt = served.answerer.prompt_tokens
    assert (answer.object, answer.model, answer.choices[0].message.role) == ("chat.completion", "sea", "assistant")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, NEW)
    ends = served.answerer.ends
    whole = list(served.answerer.tokens(ASKED, served.interventions("sea", None), _sampling()))
    served.answerer.ends = (whole[3],)
    try:
        ended = ask(client)
    finally:
        served.answerer.ends = ends
    assert ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens == whole.index(whole[3])


def _sampling() -> Any:
    from saelab.steering import Sampling

    return Sampling(max_new_tokens=NEW)


def test_a_streamed_answer_is_the_same(client: Any) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == NEW and not chunks[-1].choices
    assert len({c.id for c in chunks}) == 1


def test_sampling_is_the_librarys(client: Any, served: Served) -> None:
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    drawn = ask(client, **options, n=2)
    ours = [expected(served, add(), temperature=1.0, top_p=0.9, seed=seed) for seed in (3, 4)]
    assert [choice.message.content for choice in drawn.choices] == ours
    assert drawn.usage.completion_tokens == 2 * NEW
    both: dict[int, str] = {0: "", 1: ""}
    for chunk in ask(client, **options, n=2, stream=True):
        both[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(both.values()) == ours


def test_stop_texts_end_an_answer_before_them(client: Any) -> None:
    whole = text(ask(client, "tiny", max_tokens=24))
    stop = whole[len(whole) // 2 :][:3]
    at = whole.index(stop)
    answer = ask(client, "tiny", max_tokens=24, stop=[stop, "never"])
    assert text(answer) == whole[:at] and answer.choices[0].finish_reason == "stop"
    pieces = list(ask(client, "tiny", max_tokens=24, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole[:at]


def test_stop_texts_over_several_pieces() -> None:
    for cut in range(1, 8):
        stops, shown = StopTexts(["sea", "seal!"]), ""
        for start in range(0, 12, cut):
            shown += stops.add("the sessea x"[start : start + cut])
        assert stops.ended and shown == "the ses", cut
    stops = StopTexts(["sea"])
    assert stops.add("a se") + stops.rest() == "a se" and not stops.ended


def test_usage_is_that_of_the_answer_whatever_is_asked_between(served: Served) -> None:
    def written(messages: Any) -> Answer:
        answer, request = Answer(), Request("sea", messages, max_tokens=2, temperature=0.0)
        list(answer.pieces(served, request, served.interventions("sea", None), 0))
        return answer

    first = written(ASKED)
    read = served.answerer.prompt_tokens
    written([*ASKED[:1], {"role": "user", "content": "the cat sat the cat sat the cat sat"}])
    assert served.answerer.prompt_tokens > read
    usage = _usage([first])
    assert (usage["prompt_tokens"], usage["total_tokens"]) == (read, read + len(first.tokens))


def test_turns_keep_the_cache(client: Any, served: Served) -> None:
    first = ask(client)
    messages = [*ASKED, {"role": "assistant", "content": text(first)}, {"role": "user", "content": "rain fell"}]
    second = ask(client, messages=messages)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 8
    assert text(second) == expected(served, add(), messages=messages)


def test_many_clients_at_once_get_their_own_answers(client: Any, served: Served) -> None:
    names = ["sea", "land", "tiny", "sea@0.5"] * 3
    found: list[Any] = [None] * len(names)

    def one(place: int) -> None:
        if place % 2:
            found[place] = text(ask(client, names[place]))
        else:
            chunks = ask(client, names[place], stream=True)
            found[place] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steered = {"sea": [add()], "land": [add(-80.0)], "tiny": [], "sea@0.5": [add(30.0)]}
    assert found == [expected(served, *steered[name]) for name in names]


def test_a_client_that_leaves_ends_its_answer(client: Any, served: Served) -> None:
    modules = list(served.model.original_model.modules())
    before = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules]
    chunks = ask(client, stream=True, max_tokens=100_000)
    for _, _ in zip(range(3), chunks):
        pass
    chunks.close()
    started = time.monotonic()
    assert text(ask(client, "tiny")) == expected(served)
    assert time.monotonic() - started < 30
    leaving = openai.OpenAI(base_url=str(client.base_url), api_key="none", max_retries=0, timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        ask(leaving, max_tokens=100_000)
    assert text(ask(client, "tiny")) == expected(served)
    after = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules]
    assert after == before, "the recipe's hooks are gone"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "sky"}, 404, "the model 'sky' does not exist; there are sea, land, tiny"),
        ({"model": "sea@much"}, 400, "write for example @0.5"),
        ({"messages": []}, 400, "messages must be a list"),
        ({"messages": [{"content": "x"}]}, 400, "messages[0] needs a role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts of type text only"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "a"}]}, 400, "ends with an answer"),
        ({"temperature": 3}, 400, "temperature must be at least 0 and at most 2"),
        ({"temperature": "warm"}, 400, "temperature must be a number"),
        ({"top_p": 0}, 400, "top_p must be above 0"),
        ({"max_tokens": 0}, 400, "max_tokens must be at least 1"),
        ({"n": 1.5}, 400, "n must be a whole number"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "at most 4"),
        ({"stream": "yes"}, 400, "stream must be of type bool"),
        ({"logprobs": True}, 400, "logprobs is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"presence_penalty": 1}, 400, "presence_penalty is not supported"),
        ({"strength": "high"}, 400, "strength must be a number"),
        ({"strength": 10**400}, 400, "strength must be a number"),
        ({"seed": 10**400}, 400, "seed must be a whole number"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, 400, "is no variable of a chat template"),
    ],
    ids=str,
)
def test_what_is_wrong_is_answered_in_the_protocols_form(client: Any, options: Any, status: int, message: str) -> None:
    for stream in (False, True):
        body = {"model": "sea", "messages": ASKED, "stream": stream, **options}
        with pytest.raises(openai.APIStatusError) as error:
            client.post("/chat/completions", cast_to=object, body=body)
        assert error.value.status_code == status and message in error.value.body["message"]
        assert error.value.body["type"] == "invalid_request_error" and "\n" not in error.value.body["message"]


def test_unknown_fields_are_passed_over_and_templates_take_their_variables(client: Any, served: Served) -> None:
    assert text(ask(client, extra_body={"flavour": "salt", "user": "me", "logprobs": False})) == expected(served, add())
    calm = ask(client, extra_body={"chat_template_kwargs": {"calm": True}})
    assert text(calm) == expected(served, add(), template={"calm": True})


def test_an_error_in_the_middle_of_a_stream_is_told(
    client: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saelab.errors import UserError
    from saelab.steering import Answerer

    real = Answerer.tokens

    def failing(self: Any, *given: Any) -> Iterator[int]:
        for number, token in enumerate(real(self, *given)):
            if number == 3:
                raise UserError("the model's logits are not finite")
            yield token

    monkeypatch.setattr(Answerer, "tokens", failing)
    with pytest.raises(openai.APIError, match="logits are not finite"):
        list(ask(client, stream=True))
    with pytest.raises(openai.BadRequestError, match="logits are not finite"):
        ask(client)


def test_other_addresses_and_names_are_refused(address: str) -> None:
    for path, headers in (("/nothing", {}), ("/chat/completions", {}), ("/models", {"Host": "evil.example"})):
        request = urllib.request.Request(address + path, headers=headers)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=20)
        with error.value as answer:
            assert answer.code in (400, 404, 405)
            body = answer.read().decode()
        assert "Host" in headers or "does not exist here" in json.loads(body)["error"]["message"]


def test_deep_json_is_refused(address: str) -> None:
    request = urllib.request.Request(address + "/chat/completions", data=b"[" * 200_000)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=20)
    with error.value as answer:
        assert answer.code == 400 and "the body is not JSON" in answer.read().decode()


def test_answers_end_when_the_server_is_stopped(client: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = ask(client, stream=True, max_tokens=100_000)
    with pytest.raises(openai.APIError, match="the server was stopped"):
        for number, _ in enumerate(chunks):
            if number == 3:
                monkeypatch.setattr(served, "stopping", lambda: True)
    with pytest.raises(openai.InternalServerError, match="the server was stopped") as error:
        ask(client)
    assert error.value.status_code == 503


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.minutes)])
def test_a_long_answer_does_not_keep_the_server(folder: Path, signals: int) -> None:
    command = [sys.executable, "-m", "saelab", "serve", str(folder / "sea"), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        own = openai.OpenAI(base_url=process.stdout.readline().split()[0], api_key="none", timeout=60, max_retries=0)
        chunks = ask(own, stream=True, max_tokens=100_000)
        next(iter(chunks))
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match=r"the server was stopped|incomplete|disconnected"):
            list(chunks)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0 and "Traceback" not in error


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(folder: Path, served: Served) -> None:
    command = [sys.executable, "-m", "saelab", "serve", str(folder / "sea"), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.rstrip().endswith("/v1 answers as sea, tiny")
        own = openai.OpenAI(base_url=line.split()[0], api_key="none", timeout=60)
        assert text(ask(own)) == expected(served, add())
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    # 0 where the tests themselves run in the background of a shell, which makes processes ignore SIGINT.
    assert process.returncode in (0, 130) and "Traceback" not in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to serve"),
        (["nowhere"], "nowhere is not a recipe"),
        (["sea", "sea"], "have one name"),
        (["sea", "--port", "70000"], "port 70000 is not between"),
        (["sea", "--max-new-tokens", "0"], "must be 1 or more"),
        (["sea", "--port", "TAKEN"], "already in use"),
        (["sea", "--model", "other"], "this model has"),
        (["sea", "--model", "tiny2"], "made for other weights"),
        (["tiny3", "--model", "sea"], "is not a recipe"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], message: str, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if "other" in args:
        tiny_lm.save_gpt2(folder / "other")
    if "tiny2" in args:
        tiny_lm.save_llama(folder / "tiny2", seed=1)
    taken = bound(0)
    args = [str(taken.getsockname()[1]) if arg == "TAKEN" else arg for arg in args]
    with pytest.raises(SystemExit) as stop:
        main(["serve", *args])
    taken.close()
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and message in error and "Traceback" not in error
