"""Tokens with their activations as HTML in which nothing of the corpus is live."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from saelab.viz.escape import plain
from saelab.viz.theme import Palette

PART = "·"
Below = Callable[[float], float]


def style_sheet(colours: Palette) -> str:
    """The CSS that the fragments of this module expect, once a page."""
    return f"""<style>
[data-testid="stMainBlockContainer"] {{ padding-top: 3.75rem; padding-bottom: 3rem; max-width: 1600px; }}
[data-testid^="stBaseButton-primary"]:not(:disabled) *,
[data-baseweb="tag"], [data-baseweb="tag"] *, [data-tag], [data-tag] * {{
  color: {colours.on_primary} !important; }}
[data-testid="stCaptionContainer"], [data-testid="stCaptionContainer"] * {{
  color: {colours.muted}; opacity: 1 !important; }}
.sl-keys {{ display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; font-size: 0.88rem; color: {colours.text}; }}
.sl-key {{ display: inline-flex; align-items: center; gap: 0.45rem; overflow-wrap: anywhere; }}
.sl-line {{ flex: none; width: 36px; height: 3px; }}
.sl-facts {{ width: 100%; border-collapse: collapse; font-size: 0.88rem; color: {colours.text}; }}
.sl-facts td {{ padding: 0.4rem 0.6rem 0.4rem 0; border-bottom: 1px solid {colours.grid}; vertical-align: top; }}
.sl-facts td:nth-child(2) {{ font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.sl-facts td:nth-child(3) {{ color: {colours.muted}; }}
.sl-strip {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 0.85rem;
  line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; color: {colours.text}; }}
.sl-strip span {{ border-radius: 3px; padding: 1px 0; unicode-bidi: isolate; }}
.sl-pos {{ border-bottom: 2px solid {colours.positive}; }}
.sl-neg {{ border-bottom: 2px dotted {colours.negative}; }}
.sl-focus {{ outline: 1.5px solid {colours.text}; margin: 0 2px; font-weight: 600; }}
.sl-example {{ display: flex; gap: 0.75rem; padding: 0.35rem 0; border-bottom: 1px solid {colours.grid}; }}
.sl-example:last-child {{ border-bottom: none; }}
.sl-value {{ flex: 0 0 4.2rem; text-align: right; font-variant-numeric: tabular-nums; color: {colours.muted};
  font-size: 0.85rem; line-height: 1.75; }}
.sl-chip {{ display: inline-block; font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 0.8rem;
  white-space: pre; padding: 1px 6px; margin: 2px 4px 2px 0; border-radius: 4px; color: {colours.text};
  max-width: 100%; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom;
  border: 1px solid {colours.grid}; unicode-bidi: isolate; }}
.sl-hidden {{ position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }}
[data-testid^="stBaseButton"] {{ min-width: fit-content; }}
@media (max-width: 1000px) {{
  [data-testid="stMainBlockContainer"] {{ padding-left: 1rem; padding-right: 1rem; }}
  [data-testid="stSidebar"][aria-expanded="true"] {{ width: 200px !important; min-width: 200px !important; }}
  [data-testid="stHorizontalBlock"] {{ flex-wrap: wrap; }}
  [data-testid="stMainBlockContainer"] [data-testid="stColumn"] {{ min-width: min(100%, 17rem); flex: 1 1 17rem; }}
  [data-testid="stColumn"] [data-testid="stColumn"] {{ min-width: min(100%, 7rem); flex: 1 1 7rem; }}
}}
[data-testid^="stBaseButton"]:not(:disabled) * {{ opacity: 1 !important; }}
.sl-outdated {{ opacity: 0.55; }}
.sl-muted {{ color: {colours.muted}; font-size: 0.85rem; }}
</style>"""


def token_strip(
    strings: Sequence[str],
    values: Sequence[float],
    colours: Palette,
    scale: float | None = None,
    focus: int | None = None,
    unit: str = "activation",
    below: Below | None = None,
    breaks: bool = False,
    losses: Sequence[float] | None = None,
) -> str:
    """Tokens in running text, each tinted by its value.

    Args:
        strings: The tokens, as decoded text.
        values: One value per token; zero is not tinted.
        scale: The magnitude that gets the full tint; by default the largest in ``values``.
        focus: Position of the token to outline.
        unit: What a value is, for the tool tip.
        below: The share of a latent's firings of its sign that are weaker than a value, for the tool tip.
        breaks: Break the line where the text does.
        losses: How the loss of the text would change without the latent at each token, for the tool tip.
    """
    scale = scale or max((abs(v) for v in values), default=0.0) or 1.0
    spans = []
    for i, (string, value) in enumerate(zip(strings, values)):
        tip = f"{unit} {value:+.3f}" + (f" · above {below(value):.0%} of its firings" if below and value else "")
        tip += f" · without it the loss changes by {losses[i]:+.3f} nats" if losses is not None and value else ""
        spans.append(_span(string, value / scale, tip, i == focus, colours))
        spans += ["\n"] if breaks and "\n" in string else []
    return f'<div class="sl-strip">{"".join(spans)}</div>'


def example_list(
    examples: Iterable[Any],
    colours: Palette,
    scale: float | None = None,
    below: Below | None = None,
    breaks: bool = False,
) -> str:
    """Examples (``strings``, ``activations``, ``focus``, ``value``, ``role``) one below the other, value first.

    Under the value stands, for chats, whose message the focus token is in. ``below`` and ``breaks`` are those of
    :func:`token_strip`.
    """
    rows = []
    for example in examples:
        strip = token_strip(
            example.strings, example.activations, colours, scale, example.focus, below=below, breaks=breaks
        )
        value, token = f"{example.value:+.2f}", plain(example.strings[example.focus].strip() or "space")
        # For who hears the page: the text alone does not say which token it is about.
        said = f'<span class="sl-hidden">activation {value} on the token ‘{token}’, in: </span>'
        if example.role != "text":
            value += f"<br>{plain(example.role)}"
        shown = f'<div class="sl-value" aria-hidden="true">{value}</div>{said}{strip}'
        rows.append(f'<div class="sl-example" role="listitem">{shown}</div>')
    listed = f'<div role="list">{"".join(rows)}</div>' if rows else ""
    return listed or '<div class="sl-muted">No examples.</div>'


def counted(examples: Sequence[Any]) -> str:
    """How many contexts there are and of how many documents; in which order, where that is not by strength alone.

    The order is that of :func:`saelab.features.contexts.different_documents`.
    """
    documents = len({example.document for example in examples})
    if documents == 1:
        return f"{len(examples)} contexts, all of one document"
    order = ": the strongest of each document, then the second of each" if documents < len(examples) else ""
    return f"{len(examples)} contexts, of {documents} documents{order}"


def token_chips(strings: Sequence[str], values: Sequence[float], colours: Palette, unit: str = "logit") -> str:
    """Tokens as chips, tinted by their share of the largest value."""
    scale = max((abs(v) for v in values), default=0.0) or 1.0
    chips = [
        f'<span class="sl-chip" style="background:{colours.tint(v / scale)}" title="{unit} {v:+.3f}">'
        f"{plain(s) or '&nbsp;'}</span>"
        for s, v in zip(strings, values)
    ]
    return "<div>" + "".join(chips) + "</div>"


def fact_table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Name, value and remark in three columns; everything is escaped."""
    cells = "".join(f"<tr><td>{plain(a)}</td><td>{plain(b)}</td><td>{plain(c)}</td></tr>" for a, b, c in rows)
    return f'<table class="sl-facts">{cells}</table>'


def text_block(text: str) -> str:
    """A text as it is being written."""
    return f'<div class="sl-strip">{plain(text)}</div>'


def outdated(fragment: str) -> str:
    """A fragment of this module made pale, for what was made with settings that are no longer those shown."""
    return f'<div class="sl-outdated">{fragment}</div>'


def caption(text: str) -> str:
    """A small grey line."""
    return f'<div class="sl-muted">{plain(text)}</div>'


def _span(token: str, strength: float, tip: str, focus: bool, colours: Palette) -> str:
    # Sign is carried by the line below (solid or dotted) as well as by colour.
    classes = [] if abs(strength) < 0.02 else ["sl-pos" if strength > 0 else "sl-neg"]
    classes += ["sl-focus"] if focus else []
    attributes = f' class="{" ".join(classes)}"' if classes else ""
    attributes += f' style="background:{colours.tint(strength)}"' if strength else ""
    if not token and (strength or focus):
        token = PART  # of a character that a later token completes; the activation must not be lost from sight
    # A space that a token begins with stays outside: where the line breaks there, a mark on it would stand alone.
    word = token.lstrip(" ") or token
    space = token[: len(token) - len(word)]
    return f'{space}<span{attributes} title="{plain(token)} · {tip}">{plain(word)}</span>'
