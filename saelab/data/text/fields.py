"""Which field of a record holds its text or its chat, and what a record without one is."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from saelab.data.text.source import Chat, Document, Message
from saelab.errors import UserError

CHATS = ("messages", "conversations")
TOOLS = "tools"  # beside the messages
PROBE = 1000  # records that decide which field it is
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def texts(
    records: Iterable[tuple[str, dict[str, Any]]], column: str | None, where: str, left_out: Counter[str]
) -> Iterator[Document]:
    """The text of each record ``(place, fields)``, always of one and the same field.

    The first ``PROBE`` records decide which (:func:`choose`). A record where the field is missing, null, empty or of
    another kind is passed over and counted. Raises UserError where no field is the text, and where a ``text`` turns
    up after another field was taken for it.
    """
    records = iter(records)
    probe = list(itertools.islice(records, PROBE))
    if not probe:
        return
    kinds: dict[str, set[str]] = {}
    for _, record in probe:
        for name, value in record.items():
            kinds.setdefault(name, set()).add(kind_of(value))
    name = choose(kinds, column, where)
    for place, record in itertools.chain(probe, records):
        if column is None and name != "text" and "text" in record:
            raise UserError(f"{place} has a field 'text', the records before have {name!r}; name one as --text-column")
        yield from found(record.get(name), name, record.get(TOOLS), left_out)


def found(value: Any, name: str, tools: Any, left_out: Counter[str]) -> Iterator[Document]:
    """A record's text, or its chat with its tools; nothing, which is counted, where it is to be left out."""
    document, reason = usable(value, name)
    if reason:
        left_out[reason] += 1
    elif isinstance(document, str):
        yield document
    else:
        try:
            yield Chat(document, definitions(tools))
        except ValueError:  # the chat without them is what the model would see of a template that shows no tools
            left_out[f"lists of {TOOLS!r} that are no definitions"] += 1
            yield document


def definitions(tools: Any) -> list[dict[str, Any]]:
    """The definitions of tools in a record's list, which may be written as JSON; ValueError for anything else."""
    if isinstance(tools, str):
        tools = json.loads(tools or "[]")
    if not isinstance(tools or [], (list, tuple)):
        raise ValueError("no list")
    read = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools or []]
    if not all(isinstance(tool, dict) for tool in read):
        raise ValueError("no objects")
    return read


def choose(kinds: dict[str, set[str]], column: str | None, where: str) -> str:
    """The field with the text, given the kinds of value seen in each: the one asked for; ``text``; a chat
    (``messages``, ``conversations``); the only one that holds text. UserError names the fields there are."""
    found = [name for name, seen in kinds.items() if seen & {"text", "chat"}]
    if column is not None:
        if column not in kinds or not kinds[column] & {"text", "chat", "nothing"}:
            raise UserError(f"{where} has no text field {column!r}; it has {_names(found, kinds)}")
        return column
    if "text" in kinds and kinds["text"] & {"text", "chat", "nothing"}:
        return "text"
    for name in CHATS:
        if "chat" in kinds.get(name, ()):
            return name
    if len(found) == 1:
        return found[0]
    if "text" in kinds and not found:
        raise UserError(f"{where} has a field 'text' that holds something else than text; write each as one string")
    raise UserError(f"{where} has no field 'text'; name the text column: it has {_names(found, kinds)}")


def _names(found: list[str], kinds: dict[str, set[str]]) -> str:
    if found:
        return ", ".join(found)
    return f"none with text, only {', '.join(kinds)}" if kinds else "none"


def kind_of(value: Any) -> str:
    """``text``, ``chat``, ``nothing`` for null, or ``other``."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "text"
    return "chat" if chat(value) is not None else "other"


def usable(value: Any, name: str) -> tuple[Document, str]:
    """A field's text or chat and "", or "" and why the record is left out."""
    if value is None:
        return "", f"records without {name!r}"
    if isinstance(value, str):
        return value, "" if value else f"records with an empty {name!r}"
    messages = chat(value)
    if messages is None:
        return "", f"records whose {name!r} is not text"
    if not any(message["content"].strip() for message in messages):
        return "", f"records with an empty {name!r}"
    return messages, ""


def chat(value: Any) -> list[Message] | None:
    """A list of messages ``{role, content}`` or ``{from, value}``; None for anything else.

    A content in parts, as multimodal data has it, is the text of its parts; null is empty. What else a message
    ``{role, content}`` has (tool calls, reasoning) is kept for the chat template, but for nulls, with which tables fill
    what a record lacks.
    """
    if not isinstance(value, (list, tuple)) or not value:
        return None
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return None
        rest: dict[str, Any] = {}
        if "role" in message and ("content" in message or message.get("tool_calls")):
            role, content = message["role"], message.get("content")
            rest = {name: part for name, part in without_nulls(message).items() if name not in ("role", "content")}
        elif "from" in message and "value" in message:
            role, content = message["from"], message["value"]
            role = SHAREGPT.get(role, role) if isinstance(role, str) else role
        else:
            return None
        if isinstance(content, (list, tuple)):
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        content = "" if content is None else content
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content, **rest})
    return messages


def without_nulls(value: Any) -> Any:
    """A value without the nulls with which tables fill what a record lacks."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, (list, tuple)) else value
