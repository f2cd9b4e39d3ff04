"""Automatic interpretation against a local server that answers like a chat model would."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saelab import ActivationCache, UserError
from saelab.cli import main
from saelab.features import Example, FeatureIndex, IndexConfig, build_index
from saelab.features.explanations import ChatClient, InterpretConfig, detection, fuzzing, interpret, interpret_all, load
from saelab.features.explanations.interpretation import _divide, _silent
from saelab.features.explanations.prompts import active_places, marked
from saelab.features.explanations.scores import JudgeScore, parse
from tests.features.lookup import Lookup

CONTEXT = 16


class FakeServer:
    """Explains everything as "the word w3"; judges by looking for it, between marks where there are any."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []  # status codes to answer first
        self.answer: str | None = None  # overrides everything
        self.delay = 0.0  # seconds for an answer
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(fake.delay)
                fake.requests.append(body)
                fake.headers.append(dict(self.headers))
                status = fake.failures.pop(0) if fake.failures else 200
                content = json.dumps({"choices": [{"message": {"content": fake.reply(body)}}], "path": self.path})
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content.encode() if self.path == "/v1/chat/completions" else b"lost")

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)  # stops at once
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def reply(self, body: dict[str, Any]) -> str:
        if self.answer is not None:
            return self.answer
        system, user = (message["content"] for message in body["messages"])
        if "Explanation:" in system:
            return "Let me think.\n**Explanation:** the word w3"
        texts = re.split(r"Excerpt \d+: ", user)[1:]
        if "<<" in system:
            texts = [" ".join(re.findall(r"<<(.*?)>>", text)) for text in texts]
        verdicts = [int(re.search(r"w3(?!\d)", text) is not None) for text in texts]
        return f"Sure! {verdicts}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    fake.thread.join()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    # Fixtures of a module are made before the seed of a test is set: without their own they depend on earlier tests.
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("interp")
    n = 200 * CONTEXT
    tokens = torch.randint(4, 100, (n,))
    tokens[::50] = 3
    code = torch.zeros(n, 3)
    code[:, 0] = (tokens == 3).float() * (1 + torch.rand(n))
    code[:, 1] = (torch.rand(n) < 0.02).float()  # not the word
    acts = torch.zeros(n, 4)
    acts[:, 0] = torch.arange(n)
    cache = ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=CONTEXT)
    config = IndexConfig(silent=20)
    return build_index(Lookup(code), cache, folder / "run", token_strings=[f" w{i}" for i in range(100)], config=config)


def client(server: FakeServer, **options: Any) -> ChatClient:
    return ChatClient(server.url, "fake-1", wait=0.0, **options)


def test_a_right_explanation_scores_full_marks(index: FeatureIndex, server: FakeServer) -> None:
    found = interpret(index, 0, 1, client(server))
    assert found.text == "the word w3"
    for score in (found.detection, found.fuzzing):
        assert score.true_positives > 5 and score.true_negatives > 5
        assert score.accuracy == score.f1 == score.balanced_accuracy == 1.0
        assert score.unanswered == 0
        assert score.guess_nothing == pytest.approx(score.true_negatives / score.answered)
    assert {request["model"] for request in server.requests} == {"fake-1"}


def test_a_wrong_explanation_scores_no_better_than_guessing(index: FeatureIndex, server: FakeServer) -> None:
    found = interpret(index, 1, 1, client(server))
    assert found.detection.recall < 0.5
    assert found.fuzzing.true_positives == 0
    assert found.detection.balanced_accuracy < 0.75


def test_the_judge_never_sees_what_the_explainer_saw(index: FeatureIndex, server: FakeServer) -> None:
    interpret(index, 0, 1, client(server), config=InterpretConfig(shown=3, explain_examples=6))
    explained, *judged = (request["messages"][1]["content"] for request in server.requests)
    shown = [re.sub("<<|>>|\nStrengths.*|\n", "", text) for text in re.split(r"Excerpt \d+: ", explained)[1:]]
    assert len(shown) == 6
    for text in judged:
        excerpts = re.split(r"Excerpt \d+: ", text)[1:]
        assert 1 <= len(excerpts) <= 3
        for excerpt in excerpts:
            assert re.sub("<<|>>|\n", "", excerpt) not in shown


def test_no_token_is_shown_to_both(tmp_path: Path) -> None:
    """A latent that fires on runs of tokens, in a text whose documents partly repeat each other."""
    torch.manual_seed(0)
    n = 120 * CONTEXT
    tokens = torch.randint(4, 100, (n,))
    tokens[CONTEXT : 10 * CONTEXT] = tokens[:CONTEXT].repeat(9)
    code = torch.zeros(n, 1)
    code[:, 0] = (torch.arange(n) % (3 * CONTEXT) < 9).float() * (1 + torch.rand(n))
    acts = torch.zeros(n, 4)
    acts[:, 0] = torch.arange(n)
    cache = ActivationCache.from_tensors(tmp_path / "cache", acts, tokens, context_length=CONTEXT)
    names = [f" w{i}" for i in range(100)]
    index = build_index(Lookup(code), cache, tmp_path / "run", token_strings=names, config=IndexConfig(silent=20))
    for chosen in (_divide, _silent):
        shown, judged = chosen(index, 0, 1, InterpretConfig())
        assert shown and judged
        spans = [set(range(e.row - e.focus, e.row - e.focus + len(e.tokens))) for e in shown]
        for example in judged:
            own = range(example.row - example.focus, example.row - example.focus + len(example.tokens))
            assert not any(span & set(own) for span in spans)
            assert example.tokens not in [e.tokens for e in shown]


def test_results_are_kept_beside_the_index(index: FeatureIndex, server: FakeServer) -> None:
    ticks: list[int] = []
    done, skipped = interpret_all(index, [(0, 1), (2, 1), (1, 1)], client(server), progress=ticks.append)
    assert [e.latent for e in done] == [0, 1] and skipped == ["latent 2 (+1) never fires"] and ticks == [1, 2, 3]
    saved = load(index.run_folder)
    assert saved[0, 1]["text"] == "the word w3" and saved[0, 1]["detection"]["accuracy"] == 1.0
    assert not (index.folder / "explanations.json").exists()
    json.dumps(saved[1, 1], allow_nan=False)
    (index.run_folder / "explanations.json").write_text("[{}]")
    with pytest.raises(UserError, match="damaged"):
        load(index.run_folder)
    (index.run_folder / "explanations.json").unlink()
    with pytest.raises(UserError, match="too rarely"):
        interpret(index, 2, 1, client(server))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    """32 latents that each fire on two thirds of the occurrences of a word of their own."""
    torch.manual_seed(0)
    folder, n, width = tmp_path_factory.mktemp("many"), 200 * CONTEXT, 32
    tokens = torch.randint(0, width, (n,))
    code = torch.nn.functional.one_hot(tokens, width).float() * (torch.rand(n, 1) < 0.66)
    acts = torch.zeros(n, 4)
    acts[:, 0] = torch.arange(n)
    cache = ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=CONTEXT)
    names = [f" w{i}" for i in range(width)]
    config = IndexConfig(before=2, after=2)
    return build_index(Lookup(code), cache, folder / "run", token_strings=names, config=config)


def test_requests_fly_together_and_the_file_is_that_of_a_sequence(many: FeatureIndex, server: FakeServer) -> None:
    chosen, path = [(latent, 1) for latent in range(32)], many.run_folder / "explanations.json"
    few = {"score_examples": 5, "shown": 20}
    interpret_all(many, chosen, client(server), config=InterpretConfig(in_flight=1, **few))
    one_by_one, alone = path.read_bytes(), len(server.requests)
    path.unlink()
    server.delay = 0.5  # so long that what is computed beside it counts little on a busy machine
    started = time.monotonic()
    done, _ = interpret_all(many, chosen, client(server), config=InterpretConfig(in_flight=16, **few))
    assert time.monotonic() - started < alone * server.delay / 8
    assert path.read_bytes() == one_by_one and [e.latent for e in done] == list(range(32))
    with pytest.raises(UserError, match="in_flight"):
        InterpretConfig(in_flight=0)


def test_hard_windows_hold_the_word_and_no_firing(many: FeatureIndex, server: FakeServer) -> None:
    for latent in range(32):
        hard = many.examples(latent, kind="hard")
        assert hard and all(e.strings[e.focus] == f" w{latent}" and not any(e.activations) for e in hard)
        assert len({e.row for e in hard}) == len(hard)
    interpret(many, 3, 1, client(server))
    system, user = (message["content"] for message in server.requests[0]["messages"])
    shown = re.findall(r"Silent excerpt \d+: (.*)", user)
    assert "silent" in system and any(" w3 " in f"{text} " for text in shown) and len(shown) >= 3
    judged = "\n".join(request["messages"][1]["content"] for request in server.requests[1:])
    assert not any(re.search(rf": {re.escape(text)}$", judged, re.MULTILINE) for text in shown)
    server.requests.clear()
    interpret(many, 3, 1, client(server), config=InterpretConfig(contrast=0))
    assert "silent" not in server.requests[0]["messages"][0]["content"]


def test_a_failure_keeps_what_was_made(many: FeatureIndex, server: FakeServer) -> None:
    path = many.run_folder / "explanations.json"
    path.unlink(missing_ok=True)
    server.failures = [200] * 40 + [401]
    with pytest.raises(UserError, match="401"):
        interpret_all(many, [(latent, 1) for latent in range(9)], client(server), config=InterpretConfig(in_flight=1))
    assert load(many.run_folder)


def test_settings_that_show_nothing_are_refused() -> None:
    for wrong in ({"shown": 0}, {"score_examples": 0}, {"explain_examples": -1}):
        with pytest.raises(UserError, match="must be at least 1"):
            InterpretConfig(**wrong)
    with pytest.raises(UserError, match="share of the largest activation"):
        InterpretConfig(threshold=1.0)


def test_unreadable_answers_are_counted_not_guessed(index: FeatureIndex, server: FakeServer) -> None:
    server.answer = "I cannot tell."
    firing, silent = index.examples(0, kind="random"), index.examples(0, kind="silent")[:7]
    score = detection(client(server), "x", firing, silent, 5, 0)
    assert score.answered == 0 and score.unanswered == len(firing) + 7
    assert score.row()["accuracy"] is None


def test_always_answering_nothing_reaches_the_base_rate(index: FeatureIndex, server: FakeServer) -> None:
    server.answer = "[0, 0, 0, 0, 0]"
    firing, silent = index.examples(0, kind="random")[:5], index.examples(0, kind="silent")[:15]
    for score in (
        detection(client(server), "x", firing, silent, 5, 0),
        fuzzing(client(server), "x", firing, silent, 5, 0),
    ):
        assert score.accuracy == score.guess_nothing == 0.75
        assert score.balanced_accuracy == 0.5
        assert score.guess_everything_f1 == pytest.approx(2 * 0.25 / 1.25)


def test_a_busy_server_is_asked_again(server: FakeServer) -> None:
    server.answer, server.failures = "hello", [503, 429]
    key = {"api_key": "k"}
    assert client(server, **key).ask([{"role": "user", "content": "hi"}]) == "hello"
    assert len(server.requests) == 3
    assert server.headers[0]["Authorization"] == "Bearer k"
    server.failures = [503] * 9
    with pytest.raises(UserError, match="503"):
        client(server, retries=1).ask([])
    server.failures = [401]
    with pytest.raises(UserError, match="401"):
        client(server).ask([])
    assert len(server.requests) == 6  # a refusal is not retried


def test_unreachable_and_odd_endpoints_are_named(server: FakeServer) -> None:
    with pytest.raises(UserError, match="is the server running"):
        ChatClient("http://127.0.0.1:9", "m", retries=0, wait=0.0).ask([])
    server.answer = "x"
    with pytest.raises(UserError, match="not a chat completion"):
        ChatClient(server.url + "/other", "m", wait=0.0).ask([])
    with pytest.raises(UserError, match="not an http"):
        ChatClient("file:///etc/passwd", "m")


def example(activations: list[float], pole: int = 1) -> Example:
    strings = list("abcdef")[: len(activations)]
    return Example(0, pole, "top", 0, 0, 0, 1.0, list(range(len(strings))), strings, activations, 0)


def test_marks_enclose_runs_of_active_tokens() -> None:
    window = example([0.0, 2.0, 1.0, 0.0, 0.5])
    assert marked(window, active_places(window)) == "a<<bc>>d<<e>>"
    assert marked(window, active_places(window, 0.3)) == "a<<bc>>de"
    assert active_places(example([-3.0, 2.0, -1.0], pole=-1)) == [0, 2]
    assert active_places(example([0.0, 0.0])) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("First [1,1] then [0, 0, 1].", [False, False, True]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ('["1", 0, 1]', None),
        ("no list", None),
    ],
)
def test_answers_are_read_strictly(answer: str, expected: list[bool] | None) -> None:
    assert parse(answer, 3) == expected


def test_rates_follow_their_formulas() -> None:
    score = JudgeScore(6, 2, 8, 4, 1)
    assert score.precision == 6 / 8 and score.recall == 6 / 10 and score.specificity == 8 / 10
    assert score.accuracy == 14 / 20 and score.balanced_accuracy == pytest.approx(0.7)
    assert score.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35) and score.guess_nothing == 0.5


def test_explain_command_prints_saves_and_goes_on(
    index: FeatureIndex, server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    waited: list[float] = []
    monkeypatch.setattr("saelab.features.explanations.client.time", SimpleNamespace(sleep=waited.append))
    command = ["explain", str(index.run_folder), "--endpoint", server.url, "--model", "fake-1"]
    try:
        main([*command, "--count", "1", "--key-variable", "MY_KEY", "--judge", "fake-2", "--json"])
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["latent"], row["text"], row["detection"]["accuracy"]) == (0, "the word w3", 1.0)
        assert row["detection"]["guess_nothing"] == pytest.approx(0.5, abs=0.2)
        assert [request["model"] for request in server.requests].count("fake-1") == 1
        assert {request["model"] for request in server.requests} == {"fake-1", "fake-2"}
        assert {header["Authorization"] for header in server.headers} == {"Bearer secret"}
        # Latents without an explanation come next; one that never fires is skipped, and said so.
        main([*command, "--count", "5"])
        printed = capsys.readouterr()
        assert re.search(r"^ +1\+  the word w3$", printed.out, re.MULTILINE)
        assert "answering no" in " ".join(printed.out.split())  # the line may be wrapped
        assert sorted(load(index.run_folder)) == [(0, 1), (1, 1)]
        main([*command, "--latents", "2"])
        assert "latent 2 (+1) never fires" in capsys.readouterr().err.replace("\n", " ")
        for wrong in (["--latents", "99"], ["--latents", "0", "--endpoint", "http://127.0.0.1:1/v1"]):
            with pytest.raises(SystemExit) as left:
                main([*command, *wrong])
            error = capsys.readouterr().err
            assert left.value.code == 2 and "Traceback" not in error and ("99" in error or "127.0.0.1:1" in error)
        assert waited == [1.0, 2.0, 4.0], "for the address at which nothing listens"
    finally:
        (index.run_folder / "explanations.json").unlink(missing_ok=True)
