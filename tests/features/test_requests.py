"""Many requests at once: order, cache, budget, failures; the endpoint is a local server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from saelab import UserError
from saelab.features.explanations import ChatClient
from saelab.features.explanations.requests import KeptAnswers, OutOfRequests, in_parallel


class Slow:
    """Answers each question with itself in capitals after 50 ms, and counts how many it serves at once."""

    def __init__(self) -> None:
        self.most = self.now = self.served = 0
        self.fail_on: str | None = None
        lock, fake = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
                with lock:
                    fake.now, fake.served = fake.now + 1, fake.served + 1
                    fake.most = max(fake.most, fake.now)
                time.sleep(0.05)
                with lock:
                    fake.now -= 1
                self.send_response(400 if question == fake.fail_on else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": question.upper()}}]}).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()  # stops at once
        self.client = ChatClient(f"http://127.0.0.1:{self.server.server_port}/v1", "slow", wait=0.0, retries=0)


@pytest.fixture
def slow() -> Iterator[Slow]:
    fake = Slow()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_sixteen_are_asked_at_once_and_each_answer_is_that_of_its_question(slow: Slow) -> None:
    texts = [f"question {i}" for i in range(48)]
    found = dict(in_parallel(lambda text: slow.client.ask(question(text)), texts))
    assert found == {i: text.upper() for i, text in enumerate(texts)}
    assert 8 < slow.most <= 16  # one after another it would be 1


def test_answers_are_kept_and_a_cut_line_is_asked_again(slow: Slow, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = KeptAnswers(slow.client, path)
    assert [first.ask(question(text)) for text in ("a", "b", "a")] == ["A", "B", "A"]
    assert first.sent == slow.served == 2
    path.write_text(path.read_text()[:-20])
    again = KeptAnswers(slow.client, path)
    assert again.has(question("a")) and not again.has(question("b"))
    assert [again.ask(question(text)) for text in ("a", "b")] == ["A", "B"] and again.sent == 1
    third = KeptAnswers(slow.client, path)
    assert third.has(question("a")) and third.has(question("b"))
    other = KeptAnswers(ChatClient(slow.client.base_url, "another"), path)
    assert not other.has(question("a"))


def test_no_more_requests_are_sent_than_allowed_and_the_rest_is_done_later(slow: Slow, tmp_path: Path) -> None:
    texts = [f"q{i}" for i in range(20)]
    few = KeptAnswers(slow.client, tmp_path / "answers.jsonl", limit=7)
    done = []
    with pytest.raises(OutOfRequests, match="run the command again"):
        for number, _ in in_parallel(lambda text: few.ask(question(text)), texts):
            done.append(number)
    assert slow.served == few.sent == len(done) == 7
    rest = KeptAnswers(slow.client, tmp_path / "answers.jsonl", limit=13)
    assert len(dict(in_parallel(lambda text: rest.ask(question(text)), texts))) == 20 and slow.served == 20


def test_a_failure_ends_it_and_loses_no_answer(slow: Slow, tmp_path: Path) -> None:
    slow.fail_on = "q3"
    kept = KeptAnswers(slow.client, tmp_path / "answers.jsonl")
    done = []
    with pytest.raises(UserError, match="answered 400"):
        for number, _ in in_parallel(lambda text: kept.ask(question(text)), [f"q{i}" for i in range(40)], in_flight=4):
            done.append(number)
    assert slow.served < 40 and len(done) == slow.served - 1  # nothing begun after it, nothing lost before it
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(done)
    with pytest.raises(UserError, match="at least 1"):
        list(in_parallel(str, [1], in_flight=0))
    with pytest.raises(UserError, match="0 or more"):
        KeptAnswers(slow.client, limit=-1)
