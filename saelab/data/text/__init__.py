"""Sources of text and chats: the embedded Wikipedia sample, local files, and ``datasets`` datasets."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from saelab.data.text.fields import chat
from saelab.data.text.files import kind, open_files, open_folder
from saelab.data.text.rows import is_saved_dataset, open_hub, open_saved
from saelab.data.text.source import Chat, Document, Pieces, TextSource, counted
from saelab.data.text.wikipedia import WIKI_SAMPLE, open_wikipedia
from saelab.errors import UserError

__all__ = ["WIKI_SAMPLE", "Chat", "Document", "TextSource", "from_documents", "open_text"]


def open_text(
    source: str | Path | Sequence[str | Path], *, split: str = "train", column: str | None = None
) -> TextSource:
    """Open a text source by name, or several, which are read one after the other.

    ``source`` is ``wiki-sample``; a ``.txt`` (one document), ``.jsonl`` or ``.parquet`` file, the first two also
    compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``); a folder of such files, or one written by
    ``Dataset.save_to_disk``; or the hub id of a dataset, ``id`` or ``id:config``, of which ``split`` is streamed.
    ``column`` names the field with the text or the chat; by default ``text``, else ``messages`` or ``conversations``
    where these hold chats, else the only text field. A chat comes with its record's ``tools``. Records in which the
    field is missing, null or empty are left out and counted in ``left_out``. Raises UserError, with the remedy, if
    there is no such source.
    """
    if not isinstance(source, (str, Path)):
        return _joined([open_text(one, split=split, column=column) for one in source])
    if str(source) == WIKI_SAMPLE:
        return open_wikipedia()
    path = Path(source).expanduser()
    if path.is_file():
        return open_files(str(path), [path], column)
    if path.is_dir():
        return open_saved(path, split, column) if is_saved_dataset(path) else open_folder(path, column)
    if path.is_absolute() or kind(path) or str(source).startswith((".", "~")):
        raise UserError(f"text {source} does not exist; give {WIKI_SAMPLE}, a file or folder that does, or a hub id")
    return open_hub(str(source), split, column, f"give {WIKI_SAMPLE}, a local file or folder, or a hub id")


def from_documents(documents: Sequence[Document], name: str = "memory") -> TextSource:
    """Documents that are already in memory: texts, or chats as lists of ``{"role": ..., "content": ...}``.

    ``Chat(messages, tools)`` is a chat with the definitions of its tools.
    """
    tools = [document.tools if isinstance(document, Chat) else [] for document in documents]
    content = json.dumps(documents) + (json.dumps(tools) if any(tools) else "")
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    found: list[Document | None] = []
    for document, own in zip(documents, tools):
        messages = document if isinstance(document, str) else chat(document)
        found.append(Chat(messages, own) if own and isinstance(messages, list) else messages)
    if None in found:
        raise UserError(
            f"document {found.index(None) + 1} of {name} is neither a text nor a chat; give a string, or a list of "
            "messages with role and content"
        )
    return TextSource(name, digest, lambda: ((True, document) for document in found if document is not None))


def _joined(sources: Sequence[TextSource]) -> TextSource:
    """Several sources as one."""
    if not sources:
        raise UserError("no text is given; name at least one source")
    if len(sources) == 1:
        return sources[0]

    def read(left_out: Counter[str]) -> Pieces:
        for source in sources:
            before = left_out.copy()
            for piece in itertools.chain(source.pieces(), [None]):
                left_out.clear()
                left_out.update(before + source.left_out)
                if piece is not None:
                    yield piece

    digest = hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest()[:16]
    return counted(" + ".join(source.name for source in sources), digest, read)
