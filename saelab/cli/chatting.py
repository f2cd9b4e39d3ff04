"""``saelab steer --chat``: single questions in one batch, several turns, or a conversation on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rich.text import Text

from saelab.cli.console import console, out
from saelab.errors import UserError
from saelab.lm.tokens import token_ids
from saelab.steering import Chat, Intervention, answer_chats, encode_chat, generate
from saelab.steering.chat import Message
from saelab.steering.measure.passages import Passage

Steps = Sequence[Intervention]


class ChatOptions(Protocol):
    """What the options of a command say about a chat."""

    @property
    def chat(self) -> bool: ...
    @property
    def system(self) -> str | None: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def seed(self) -> int: ...


def sampling(options: ChatOptions) -> dict[str, Any]:
    """The settings of the sampling among the options."""
    return {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}


def opening(options: ChatOptions, prompt: str) -> list[Message]:
    """The chat that a single prompt begins."""
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [*system, {"role": "user", "content": prompt}]


def as_text(options: ChatOptions, model: Any, prompt: str) -> str:
    """The text that the model reads for a single prompt."""
    return encode_chat(model.tokenizer, opening(options, prompt)).text


def continuations(options: ChatOptions, steps: Steps, model: Any, prompts: Sequence[str]) -> list[str]:
    """What the model writes after each prompt, in one batch: a continuation, or the answer to a chat of its own."""
    if not prompts:
        return []
    if options.chat:
        return answer_chats(model, [opening(options, prompt) for prompt in prompts], steps, **sampling(options))
    return list(generate(model, list(prompts), steps, **sampling(options)))


def turns(options: ChatOptions, steps: Steps, model: Any, prompts: Sequence[str]) -> list[Message]:
    """One chat in which the prompts are asked in turn."""
    chat = started(options, steps, model)
    for prompt in prompts:
        chat.say(prompt)
    return chat.messages


def started(options: ChatOptions, steps: Steps, model: Any) -> Chat:
    """A chat before the first message."""
    return Chat(model, steps, system=options.system or "", **sampling(options))


def converse(options: ChatOptions, steps: Steps, model: Any, silent: bool = False) -> list[Message]:
    """Answer the lines of the standard input as they come, until it ends; the answers are printed unless ``silent``."""
    chat = started(options, steps, model)
    for line in _lines():
        try:
            for piece in chat.stream(line):
                if not silent:
                    out.print(Text(piece), end="", soft_wrap=True)
        except UserError as error:  # a line that cannot be answered, as one that is too long, does not end the chat
            console.print(f"error: {error}", markup=False, soft_wrap=True)
            continue
        if not silent:
            out.print()
    return chat.messages


def _lines() -> Iterator[str]:
    """The lines that say something; a terminal is shown a prompt."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            console.print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def show_messages(messages: list[Message], title: str = "") -> None:
    """A chat, one message after another."""
    if title:
        out.print(Text(f"\n{title}", style="dim"))
    for message in messages:
        out.print(Text(f"{message['role']:<10}", style="dim"), Text(message["content"]))


def passages(options: ChatOptions, model: Any, result: dict[str, Any]) -> list[Passage]:
    """The texts of a result, as the steered model read them: what was asked, and what it wrote."""
    tokenizer = model.tokenizer
    if "messages" in result:
        asked = [(result["messages"][:-1], result["messages"][-1]["content"])]
    elif options.chat:
        asked = [(opening(options, row["prompt"]), row["steered"]) for row in result["texts"]]
    else:
        rows = result["texts"]
        return [
            Passage(token_ids(tokenizer, row["prompt"]), token_ids(tokenizer, row["steered"], bos=False))
            for row in rows
        ]
    chats = [(encode_chat(tokenizer, messages), text) for messages, text in asked]
    return [Passage(chat.ids, token_ids(tokenizer, text, bos=False), chat.roles) for chat, text in chats]
