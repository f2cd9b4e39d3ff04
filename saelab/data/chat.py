"""Chats as text: the model's chat template, and which part of the text each message is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saelab.data.text.source import Chat, Message
from saelab.errors import UserError, first_line

# The place of a role in this list is its number in the shards of a cache: new ones go to the end.
ROLES = ("text", "separator", "template", "system", "developer", "user", "assistant", "tool", "other")
TEXT, SEPARATOR, TEMPLATE = range(3)
OTHER_NAMES = {"model": "assistant", "function": "tool", "ipython": "tool", "observation": "tool"}


class Rendered(NamedTuple):
    """A chat as one text, and for each message whose content was found in it ``(start, stop, role)`` in characters."""

    text: str
    spans: list[tuple[int, int, int]]


def role_number(name: str) -> int:
    """The number of a message's role."""
    name = OTHER_NAMES.get(name, name)
    return ROLES.index(name) if name in ROLES[TEMPLATE + 1 :] else ROLES.index("other")


def check_roles(roles: Sequence[str]) -> None:
    """Refuse a name that is not a role, and the separator, which has no rows."""
    known = [name for name in ROLES if name != ROLES[SEPARATOR]]
    if wrong := [name for name in roles if name not in known]:
        raise UserError(f"unknown role {wrong[0]!r}; roles are {', '.join(known)}")


def shows_tools(tokenizer: Any, chat: Chat) -> bool:
    """Whether the tokenizer's template writes the definitions of a chat's tools; ValueError where it refuses them."""
    with_tools = _apply(tokenizer, chat, {"tools": chat.tools})
    try:
        return with_tools != _apply(tokenizer, chat, {})
    except ValueError:  # the calls of tools in a chat without any
        return True


def render(tokenizer: Any, messages: Sequence[Message], **options: Any) -> Rendered:
    """A chat through the tokenizer's template, which is given the ``options`` (``add_generation_prompt=True``) and
    the tools of a :class:`~saelab.data.text.Chat`.

    Raises UserError where the tokenizer has no template, and ValueError where the template refuses this chat.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template, which messages "
            "need; give a model that has one, or a column of plain text"
        )
    if isinstance(messages, Chat) and messages.tools:
        options = {"tools": messages.tools, **options}
    text = _apply(tokenizer, messages, options)
    # Where the contents stand is seen by rendering the chat again with marks in their place: a search for the contents
    # would find "user" in the template's own text. An empty content (of calls of tools) stays so: around a mark the
    # template may write something else.
    marks = [f"\ue000{number}\ue001" if m["content"] else "" for number, m in enumerate(messages)]
    try:
        frame = _apply(tokenizer, [{**m, "content": mark} for m, mark in zip(messages, marks)], options)
    except ValueError:  # a template that looks into the contents
        frame = ""
    spans, place = [], 0
    for mark, message in zip(marks, messages):
        if not mark:
            continue
        before, found, frame = frame.partition(mark)
        start = place + len(before) if found and text.startswith(before, place) else -1
        for content in (message["content"], message["content"].strip()):
            if start >= 0 and text.startswith(content, start):
                break
        else:  # the template rewrote something
            content = message["content"].strip()
            start = text.find(content, place)
            frame = frame if found else ""
        if start < 0:
            continue
        place = start + len(content)
        if content:
            spans.append((start, place, role_number(message["role"])))
    return Rendered(text, spans)


def _apply(tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # the template's own exceptions (jinja's), and those of what it calls
        raise ValueError(first_line(error)) from error


def roles_of(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    """The role of each token, given its ``(start, stop)`` in the text: that of the message it has a character of."""
    roles = np.full(len(offsets), TEMPLATE)
    if not spans or not len(offsets):
        return roles
    begin, end = np.asarray(offsets, dtype=np.int64).T
    starts, stops, numbers = np.asarray(spans, dtype=np.int64).T
    # The first message that ends behind the token's start.
    at = np.searchsorted(stops, begin, side="right").clip(max=len(spans) - 1)
    inside = (begin < stops[at]) & (end > starts[at])
    roles[inside] = numbers[at][inside]
    return roles
