"""The server: one model, several recipes, one request at a time, on the loopback interface.

Requests wait for one another, because the hooks of a recipe are state of the model. Between two tokens the server looks
whether the client is still there. Nothing is logged but errors.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import nn

from saelab.errors import UserError, first_line
from saelab.lm.tokens import written_text
from saelab.serving.protocol import ProtocolError, Request, StopTexts
from saelab.steering import Answerer, Intervention, Recipe, Sampling

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse, Response

HOST = "127.0.0.1"
NAMES = (HOST, "localhost", "[::1]", "testserver")  # a page of another name that resolves to this machine is refused


@dataclass
class Served:
    """A model with the recipes that a client may name; ``base`` is the name of the unsteered model."""

    model: nn.Module
    recipes: dict[str, Recipe]
    base: str
    most_tokens: int = 1024  # of an answer, where the client names no limit
    created: int = field(default_factory=lambda: int(time.time()))
    stopping: Callable[[], bool] = lambda: False  # whether answers under way are to end

    def __post_init__(self) -> None:
        if self.base in self.recipes:
            raise UserError(f"the recipe {self.base} has the name of the model; rename its folder")
        self.answerer = Answerer(self.model)
        self._multiplied: dict[tuple[str, float], list[Intervention]] = {}

    @property
    def names(self) -> list[str]:
        """Every model that a client may name."""
        return [*self.recipes, self.base]

    def interventions(self, model: str, strength: float | None) -> list[Intervention]:
        """Those of a recipe's name, or ``name@0.5`` for half of its change; a strength of its own comes first."""
        name, _, factor = model.rpartition("@") if model not in self.names and "@" in model else (model, "", "")
        if name not in self.names:
            known = ", ".join(self.names)
            raise ProtocolError(
                f"the model {model!r} does not exist; there are {known}", "model", "model_not_found", 404
            )
        if strength is None:
            strength = _factor(factor, model)
        if name == self.base:
            return []
        key = (name, strength)
        if key not in self._multiplied:
            if len(self._multiplied) > 64:
                self._multiplied.clear()
            # The same objects for the same request: what the cache of the last chat was computed with is known by them.
            self._multiplied[key] = [one.times(strength) for one in self.recipes[name].interventions]
        return self._multiplied[key]


def _factor(text: str, model: str) -> float:
    try:
        number = float(text or 1)
        if abs(number) <= 1e6:
            return number
    except ValueError:
        pass
    raise ProtocolError(f"{model!r}: what follows @ is no strength; write for example @0.5", "model", "invalid_value")


@dataclass
class Answer:
    """One answer while it is written."""

    tokens: list[int] = field(default_factory=list)
    finish: str = "length"
    text: str = ""
    read: int = 0  # tokens of the prompt
    kept: int = 0  # of those, taken from the cache

    def pieces(
        self, served: Served, request: Request, steered: Sequence[Intervention], seed: int
    ) -> Generator[str, None, None]:
        """The parts of the text that may be shown, token by token; often empty."""
        most = request.max_tokens or served.most_tokens
        sampling = Sampling(most, request.temperature, request.top_p, seed)
        answerer, stops, shown = served.answerer, StopTexts(request.stop), ""
        answerer.template = request.template
        steps = answerer.tokens(request.messages, steered, sampling)
        try:
            for token in steps:
                self.tokens.append(token)
                whole = written_text(answerer.tokenizer, self.tokens)
                piece, shown = stops.add(whole[len(shown) :]), whole
                self.text += piece
                yield piece
                if stops.ended:
                    break
        finally:
            steps.close()  # takes the hooks off the model
        self.read, self.kept = answerer.prompt_tokens, answerer.reused  # another request's as soon as its turn comes
        self.finish = "stop" if stops.ended or len(self.tokens) < most else "length"
        rest = stops.rest()
        self.text += rest
        yield rest


def application(served: Served) -> Starlette:
    """The web application, to be run by any ASGI server in one process."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    api = Api(served)
    routes = [
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ]
    handlers: Any = {ProtocolError: _refused, UserError: _refused, 404: _unknown, 405: _unknown, Exception: _broken}
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES))
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


class Api:
    """The addresses of the server."""

    def __init__(self, served: Served) -> None:
        self.served, self.turn = served, asyncio.Lock()

    async def models(self, _: HttpRequest) -> JSONResponse:
        """The recipes and the unsteered model."""
        return _json({"object": "list", "data": [self._model(name) for name in self.served.names]})

    async def model(self, http: HttpRequest) -> JSONResponse:
        """One of them, also at a strength."""
        name = http.path_params["name"]
        self.served.interventions(name, None)
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.served.created, "owned_by": "saelab"}

    async def chat(self, http: HttpRequest) -> Response:
        """An answer, whole or in pieces."""
        from starlette.responses import StreamingResponse

        request = Request.read(await http.body())
        steered = self.served.interventions(request.model, request.strength)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": request.model}
        if request.stream:
            # The first step runs before the response begins, so that what is wrong has its status.
            events = _events(self.served, request, steered, head, self.turn, http)
            return StreamingResponse(_chain(await anext(events), events), media_type="text/event-stream")
        answers = [Answer() for _ in range(request.n)]
        for index, answer in enumerate(answers):
            async for _ in _written(self.served, request, steered, index, answer, self.turn, http):
                pass
        told = [{"message": {"role": "assistant", "content": answer.text}} for answer in answers]
        choices = [_choice(i, answer, content) for i, (answer, content) in enumerate(zip(answers, told))]
        usage = _usage(answers)
        return _json({**head, "object": "chat.completion", "choices": choices, "usage": usage})


def _json(content: dict[str, Any], status: int = 200) -> JSONResponse:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=status)


async def _refused(_: HttpRequest, error: Exception) -> JSONResponse:
    error = error if isinstance(error, ProtocolError) else ProtocolError(str(error))
    return _json(error.body(), error.status)


async def _broken(http: HttpRequest, error: Exception) -> JSONResponse:
    return await _refused(http, ProtocolError(f"{type(error).__name__}: {first_line(error)}", status=500))


async def _unknown(http: HttpRequest, error: Exception) -> JSONResponse:
    status = getattr(error, "status_code", 404)
    return await _refused(http, ProtocolError(f"{http.method} {http.url.path} does not exist here", status=status))


async def _written(
    served: Served,
    request: Request,
    steered: Sequence[Intervention],
    index: int,
    answer: Answer,
    turn: asyncio.Lock,
    http: HttpRequest,
) -> AsyncIterator[str]:
    """The pieces of one answer, computed in a thread; nobody else uses the model meanwhile."""
    from starlette.concurrency import run_in_threadpool

    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    async with turn:
        pieces = answer.pieces(served, request, steered, (seed + index) % 2**63)
        try:
            while True:
                if served.stopping():
                    raise ProtocolError("the server was stopped; ask again when it runs", status=503)
                piece = await run_in_threadpool(next, pieces, None)
                if piece is None or await http.is_disconnected():
                    return
                yield piece
        finally:
            pieces.close()


async def _events(
    served: Served,
    request: Request,
    steered: Sequence[Intervention],
    head: dict[str, Any],
    turn: asyncio.Lock,
    http: HttpRequest,
) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    frame = {**head, "object": "chat.completion.chunk"}
    answers = []
    try:
        for index in range(request.n):
            answer = Answer()
            answers.append(answer)
            delta: dict[str, Any] = {"role": "assistant", "content": ""}
            async for piece in _written(served, request, steered, index, answer, turn, http):
                if delta.get("role") or piece:
                    delta["content"] = piece
                    yield _event(frame | {"choices": [_choice(index, None, {"delta": delta})]})
                    delta = {}
            yield _event(frame | {"choices": [_choice(index, answer, {"delta": {}})]})
        if request.include_usage:
            yield _event(frame | {"choices": [], "usage": _usage(answers)})
        yield "data: [DONE]\n\n"
    except (UserError, ProtocolError) as error:
        if not answers[0].tokens:
            raise
        # The status of the answer is already sent.
        yield _event((error if isinstance(error, ProtocolError) else ProtocolError(str(error), status=500)).body())


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    try:
        async for event in rest:
            yield event
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _choice(index: int, answer: Answer | None, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, **content, "finish_reason": None if answer is None else answer.finish, "logprobs": None}


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
    written, read = sum(len(answer.tokens) for answer in answers), answers[-1].read
    kept = {"cached_tokens": answers[-1].kept}
    total = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return total | {"prompt_tokens_details": kept}


def recipe_names(folders: Sequence[Path]) -> dict[str, Path]:
    """The name of each recipe: that of its folder. UserError for two of one name."""
    found: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in found:
            raise UserError(
                f"{found[name]} and {folder} have one name; rename a folder, so that clients can tell them apart"
            )
        found[name] = folder
    return found


def bound(port: int) -> socket.socket:
    """A socket that listens on the loopback interface; UserError where the port is taken. Port 0 takes any free one.

    It listens at once: until it does, another process can have the same port, and finds out when it begins to.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        why = error.strerror or first_line(error)
        raise UserError(f"port {port}: {why}; choose another with --port, 0 takes one that is free") from error
    return listener


def serve(served: Served, listener: socket.socket) -> None:
    """Answer requests until the process is interrupted: answers under way end at their next token.

    A second signal ends the process at once, also while the model reads a long prompt.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                os._exit(128 + sig)
            super().handle_exit(sig, frame)

    server = Server(uvicorn.Config(application(served), log_level="warning", access_log=False))
    served.stopping = lambda: server.should_exit
    server.run(sockets=[listener])
