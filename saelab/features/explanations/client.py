"""A client for any endpoint that speaks OpenAI's chat completions: llama.cpp, vLLM, Ollama, a hosted service."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from saelab.errors import UserError
from saelab.vocabulary import storable

Message = dict[str, str]  # role, content
RETRIED = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class ChatClient:
    """``base_url`` ends before ``/chat/completions``, e.g. ``http://localhost:8000/v1``.

    Busy and failing servers are asked ``retries`` times more, after ``wait`` seconds and then twice as long each time.
    """

    base_url: str
    model: str
    api_key: str | None = None
    timeout: float = 120.0  # seconds for one answer
    retries: int = 3
    wait: float = 1.0
    temperature: float = 0.0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"endpoint {self.base_url!r} is not an http(s) address, e.g. http://localhost:8000/v1")

    def ask(self, messages: list[Message]) -> str:
        """The model's answer. Raises UserError if the endpoint cannot be reached or its answer is unusable."""
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        for attempt in range(self.retries + 1):
            try:
                return _content(self._post(body))
            except urllib.error.HTTPError as error:
                with error:  # it holds the connection
                    if error.code not in RETRIED or attempt == self.retries:
                        detail = " ".join(error.read().decode(errors="replace").split())[:200]
                        raise UserError(
                            f"{self.base_url} answered {error.code} {error.reason}: {detail}; "
                            "check the model's name and the key"
                        ) from error
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if attempt == self.retries:
                    reason = getattr(error, "reason", error)
                    raise UserError(f"cannot reach {self.base_url} ({reason}); is the server running?") from error
            time.sleep(self.wait * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return response.read()


def _content(raw: bytes) -> str:
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"the endpoint's answer is not a chat completion: {raw[:120]!r}; give its address up to /v1"
        ) from error
    if not isinstance(content, str):
        raise UserError(f"the endpoint's answer holds no text: {raw[:120]!r}; try another model")
    return storable(content)
