"""A local endpoint that rates texts as a chat model would, with the ways in which real ones fail."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeJudge:
    """Rates by ``rate(rubric, subject, text)``; keeps what it was asked."""

    def __init__(self, rate: Any) -> None:
        self.rate, self.asked, self.most, self.now = rate, [], 0, 0
        self.delay, self.fail_after, self.failure = 0.0, None, 500
        lock, fake = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.asked.append(body)
                    fake.now += 1
                    fake.most = max(fake.most, fake.now)
                    down = fake.fail_after is not None and len(fake.asked) > fake.fail_after
                time.sleep(fake.delay)
                answer = fake.rate(*understood(body["messages"][-1]["content"]))
                with lock:
                    fake.now -= 1
                self.send_response(fake.failure if down else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": str(answer)}}]}).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()  # stops at once
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def understood(user: str) -> tuple[str, str, str]:
    """Rubric, subject and text of a question, in either wording."""
    text = user.partition("<<<\n")[2].rpartition("\n>>>")[0]
    for rubric, pattern in (
        ("concept", r"about this concept: (.+)\?|Concept: (.+)"),
        ("instruction", r"A person was asked: (.+)|Task: (.+)"),
    ):
        if found := re.search(pattern, user.partition("<<<")[0]):
            return rubric, found[1] or found[2], text
    return "fluency", "", text


def fair(known: dict[str, str], own: dict[str, str]) -> Any:
    """A judge that sees ``known[concept]`` in a text, knows the ``own`` answers of instructions, and minds order."""

    def rate(rubric: str, subject: str, text: str) -> str:
        if rubric == "concept":
            return f"Rating: {2 if known[subject] in text.split() else 0}"
        if rubric == "instruction":
            return "2" if own.get(subject, "").split()[:3] == text.split()[:3] else "Let me think. 0"
        return "2" if text in own.values() else "1"

    return rate


def constant(rubric: str, subject: str, text: str) -> str:
    return "2"


def at_random(seed: int = 0) -> Any:
    rng = random.Random(seed)
    return lambda rubric, subject, text: str(rng.choice([0, 1, 2]))
