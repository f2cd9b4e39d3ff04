"""Escape corpus text, so that it is shown as data whatever it looks like.

A token can be ``<script>``, markdown, a control character or a bidirectional override. ``visible`` replaces what a
reader could not see (or what would rearrange the line) by a symbol; ``plain`` is that, escaped for HTML;
``markdown`` is that, escaped for widgets which render markdown.
"""

from __future__ import annotations

import html
import re
import unicodedata

# Control, zero-width and direction-changing characters hide or reorder the text around them.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~$:&^=@])")


def visible(text: str) -> str:
    """``text`` on one line, every character of which can be seen and none of which moves its neighbours.

    Line breaks become ``⏎`` and tabs ``⇥``; control, format, private, surrogate and unassigned characters become
    their code point in angle brackets (``⟨U+202E⟩``), because few fonts draw Unicode's control pictures. Spaces stay.
    """
    return "".join(map(_show, text))


def plain(text: str) -> str:
    """``visible(text)`` escaped for HTML text and attributes."""
    return html.escape(visible(text), quote=True)


def label(text: str) -> str:
    """``visible(text)`` for plotly's labels: they read tags and a few entities, and show others as they are written."""
    return html.escape(visible(text), quote=False)


def markdown(text: str) -> str:
    """``visible(text)`` with every character that means something to markdown escaped."""
    return _MARKDOWN.sub(r"\\\1", visible(text))


def _show(char: str) -> str:
    if char == "\n":
        return "⏎"
    if char == "\t":
        return "⇥"
    if unicodedata.category(char) in _INVISIBLE:
        return f"⟨U+{ord(char):04X}⟩"
    return char
