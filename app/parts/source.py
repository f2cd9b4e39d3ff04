"""The source of numbers: formula, tokens, seed and the command that computes them."""

from __future__ import annotations

from typing import Any

import page
import streamlit as st

from saelab import viz, workspace
from saelab.runs import Run


def of_run(run: Run) -> None:
    """Each number of a run with its formula and sample, and the commands that measure them."""
    for note in run.notes:
        st.caption(f"Note: {viz.markdown(note)}")
    known = workspace.numbers(run)
    if not known:
        st.caption("Nothing has been measured yet; `saelab evaluate RUN --cache CACHE` measures the run.")
        return
    page.html(viz.fact_table([(workspace.TITLES[name], n.text(), n.sample()) for name, n in known.items()]))
    commands(*(n.command for n in known.values()))


def commands(*found: str | None) -> None:
    """Commands to copy, each once."""
    lines = [line for line in dict.fromkeys(found) if line]
    st.code("\n".join(viz.visible(line) for line in lines), language=None, wrap_lines=True)


def of_index(run: Run, index: Any, columns: tuple[str, ...]) -> None:
    """A popover on the feature index: tokens, seed, command, and what each of ``columns`` is."""
    meta = index.meta
    with st.popover("Where these numbers come from", icon=":material/info:"):
        seed = f"seed {meta['config']['seed']} of the sampled examples"
        about = [("tokens", f"{meta['tokens']:,}", f"of {meta['cache']} ({meta['hook_name']}), {seed}")]
        if meta.get("logit_lens"):
            about.append(("logit effects", "", f"decoder row × final norm weight × unembedding of {meta['model']}"))
        known = meta["columns"]
        page.html(viz.fact_table([*about, *((name, "", known[name]) for name in columns if name in known)]))
        commands(workspace.index_command(run.name, meta))
