"""Corpus text made inert: tokens are data, whatever they look like.

A token can be ``<script>``, markdown, a control character or a bidirectional override. ``visible`` replaces what a
reader could not see (or what would rearrange the line) by a symbol; ``plain`` is that, escaped for HTML;
``markdown`` is that, escaped for widgets which render markdown.
"""

from __future__ import annotations

import html
import re
import unicodedata

# Zero-width and direction-changing characters: they reorder or hide the text around them.
_INVISIBLE = {"Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~$:&^=@])")


def visible(text: str) -> str:
    """``text`` on one line, every character of which can be seen and none of which moves its neighbours.

    Line breaks become ``⏎``, tabs ``⇥``, other control characters their Unicode pictures, and format, private,
    surrogate and unassigned characters their code point in angle brackets (``⟨U+202E⟩``). Spaces stay.
    """
    return "".join(map(_show, text))


def plain(text: str) -> str:
    """``visible(text)`` escaped for HTML text and attributes, and for plotly's labels, which read some HTML."""
    return html.escape(visible(text), quote=True)


def markdown(text: str) -> str:
    """``visible(text)`` with every character that means something to markdown escaped."""
    return _MARKDOWN.sub(r"\\\1", visible(text))


def _show(char: str) -> str:
    code = ord(char)
    if char == "\n":
        return "⏎"
    if char == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if 0x80 <= code < 0xA0 or unicodedata.category(char) in _INVISIBLE:
        return f"⟨U+{code:04X}⟩"
    return char
