"""A text whose tokens can be chosen, by a click or with the arrow keys: a component of Streamlit's, without a build."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import page
import streamlit as st
from streamlit.components.v2 import component

from saelab import viz

# Texts are set as text, never as HTML, so nothing of the reader's or the corpus's is live.
_SCRIPT = """
export default function ({ parentElement, data, setStateValue }) {
  const box = parentElement.querySelector('.strip');
  const choose = (position) => {
    if (position < 0 || position >= data.tokens.length) return;
    mark(position);
    setStateValue('chosen', position);
  };
  const mark = (position) => {
    box.querySelectorAll('[aria-selected=true]').forEach((e) => e.setAttribute('aria-selected', 'false'));
    const token = box.querySelector(`[data-position="${position}"]`);
    if (!token) return;
    token.setAttribute('aria-selected', 'true');
    box.setAttribute('aria-activedescendant', token.id);
    token.scrollIntoView({ block: 'nearest' });
  };
  const drawn = JSON.stringify(data.tokens);
  if (box.dataset.drawn !== drawn) {
    box.replaceChildren(...data.tokens.map((token, position) => {
      const span = document.createElement('span');
      span.textContent = token.text;
      span.title = token.title;
      span.id = `token-${position}`;
      span.dataset.position = position;
      span.setAttribute('role', 'option');
      span.setAttribute('aria-label', token.title);
      if (token.tint) span.style.background = token.tint;
      if (token.side) span.classList.add(token.side);
      return span;
    }));
    box.dataset.drawn = drawn;
  }
  box.setAttribute('aria-label', data.label);
  box.style.setProperty('--text', data.text);
  box.style.setProperty('--pos', data.pos);
  box.style.setProperty('--neg', data.neg);
  mark(data.chosen);
  box.onclick = (event) => {
    const token = event.target.closest('[data-position]');
    if (token) choose(Number(token.dataset.position));
  };
  box.onkeydown = (event) => {
    const now = Number(box.querySelector('[aria-selected=true]')?.dataset.position ?? -1);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (event.key === 'Home') choose(0);
    else if (event.key === 'End') choose(data.tokens.length - 1);
    else if (step) choose(Math.min(Math.max(now + step, 0), data.tokens.length - 1));
    else return;
    event.preventDefault();
  };
}
"""
_STYLE = """
.strip { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 0.9rem; line-height: 1.9;
  white-space: pre-wrap; overflow-wrap: anywhere; color: var(--text); max-height: 22rem; overflow-y: auto;
  padding: 0.25rem; }
.strip span { border-radius: 3px; padding: 1px 0; unicode-bidi: isolate; cursor: pointer; }
.strip .pos { border-bottom: 2px solid var(--pos); }
.strip .neg { border-bottom: 2px dotted var(--neg); }
.strip [aria-selected=true] { outline: 2px solid var(--text); font-weight: 600; }
.strip:focus-visible { outline: 2px solid var(--pos); }
"""
_component = component(
    "saelab_token_strip", html='<div class="strip" role="listbox" tabindex="0"></div>', css=_STYLE, js=_SCRIPT
)


def tokens(
    strings: Sequence[str],
    values: Sequence[float],
    chosen: int,
    on_choice: Callable[[int], None],
    *,
    unit: str,
    scale: float | None = None,
    key: str,
) -> None:
    """The tokens of a text, tinted by ``values`` up to ``scale``; ``on_choice`` is called with a chosen position."""
    colours = page.colours()
    scale = scale or max((abs(v) for v in values), default=0.0) or 1.0
    shown = []
    for position, (string, value) in enumerate(zip(strings, values)):
        strength = value / scale
        name = viz.visible(string)
        shown.append(
            {
                "text": (name or viz.PART) + "\n" * string.count("\n"),
                "title": f"token {position}: {name.strip() or '␣'}, {unit} {value:+.3f}",
                "tint": colours.tint(strength) if strength else "",
                "side": "" if abs(strength) < 0.02 else "pos" if strength > 0 else "neg",
            }
        )

    def take() -> None:
        position = (st.session_state.get(key) or {}).get("chosen")
        if isinstance(position, int | float) and 0 <= position < len(strings):
            on_choice(int(position))

    _component(
        key=key,
        data={
            "tokens": shown,
            "chosen": chosen,
            "label": "The text's tokens; the arrow keys choose one",
            "text": colours.text,
            "pos": colours.positive,
            "neg": colours.negative,
        },
        on_chosen_change=take,
    )
