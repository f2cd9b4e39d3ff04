"""The part of OpenAI's chat-completions protocol that a local model can answer: requests, answers and errors.

Fields that are not known are passed over, as servers of this protocol do. Fields that are known and would change the
answer in a way that this server cannot are refused, so that no client takes an answer for what it is not.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Field -> values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}
MOST_STOPS, MOST_CHOICES = 4, 16
LARGEST = sys.float_info.max  # JSON has whole numbers of any length


class ProtocolError(Exception):
    """A request that is answered with an error: its HTTP status, message, offending field and code."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        """The error as the protocol writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False
    strength: float | None = None  # ours: the recipe's change is multiplied by it
    template: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, raw: bytes) -> Request:
        """The request in a body; ProtocolError for one that is none."""
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise ProtocolError("the body is not a JSON object")
        _refuse_unsupported(body)
        # The former is the newer name.
        longest = next((n for n in ("max_completion_tokens", "max_tokens") if body.get(n) is not None), None)
        options = _typed(body, "stream_options", dict, {})
        return cls(
            model=_typed(body, "model", str, ""),
            messages=_messages(body),
            max_tokens=None if longest is None else int(_number(body, longest, 1, 1, whole=True)),
            temperature=_number(body, "temperature", 1.0, 0, 2),
            top_p=_number(body, "top_p", 1.0, 0, 1, above=True),
            seed=None if body.get("seed") is None else int(_number(body, "seed", 0, -(2**63), whole=True)),
            n=int(_number(body, "n", 1, 1, MOST_CHOICES, whole=True)),
            stop=_stops(body.get("stop")),
            stream=_typed(body, "stream", bool, False),
            include_usage=_typed(options, "include_usage", bool, False),
            strength=None if body.get("strength") is None else _number(body, "strength", 1.0),
            template=_typed(body, "chat_template_kwargs", dict, {}),
        )


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    for name, idle in UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and value not in idle:
            raise ProtocolError(f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")


def _typed(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ProtocolError(
            f"{name} must be of type {kind.__name__}, not {json.dumps(value)[:80]}", name, "invalid_type"
        )
    return value


def _number(
    body: Mapping[str, Any],
    name: str,
    default: float,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: bool = False,
    whole: bool = False,
) -> float:
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    if not is_number or (whole and value != int(value)):
        raise ProtocolError(
            f"{name} must be a {'whole ' * whole}number, not {json.dumps(value)[:80]}", name, "invalid_type"
        )
    if not least <= value <= most or (above and value == least):
        bounds = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
        raise ProtocolError(f"{name} must be {bounds}, not {value}", name, "invalid_value")
    return value


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ProtocolError("messages must be a list of at least one message", "messages", "invalid_type")
    return [{"role": _role(m, i), "content": _content(m, i)} for i, m in enumerate(messages)]


def _role(message: Any, place: int) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise ProtocolError(f"messages[{place}] needs a role", f"messages[{place}].role", "invalid_type")
    return role


def _content(message: dict[str, Any], place: int) -> str:
    """The text of a message, which may be given in parts."""
    where, content = f"messages[{place}].content", message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant":
        return ""
    if not isinstance(content, list):
        raise ProtocolError(f"{where} must be text, or a list of parts", where, "invalid_type")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ProtocolError(f"{where} may hold parts of type text only", where, "invalid_value")
        texts.append(part["text"])
    return "".join(texts)


def _stops(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ProtocolError(f"stop must be a text or a list of at most {MOST_STOPS} texts", "stop", "invalid_value")
    return stops


class StopTexts:
    """Ends a text that comes in pieces before the first of the stop texts; holds back what may be the start of one."""

    def __init__(self, stops: list[str]) -> None:
        self.stops, self._held, self.ended = stops, "", False

    def add(self, piece: str) -> str:
        """What may be shown now."""
        if self.ended:
            return ""
        self._held += piece
        at = min((found for stop in self.stops if (found := self._held.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.ended, shown, self._held = True, self._held[:at], ""
            return shown
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
