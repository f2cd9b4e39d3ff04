"""What all pages share: colours, style sheet, figures, the sidebar, and the code that runs a page."""

from __future__ import annotations

from typing import Any

import streamlit as st
from loaders import workspace
from session import show_link

from saelab import viz
from saelab.errors import UserError, first_line
from saelab.runs import Run


def colours() -> viz.Palette:
    """The palette of the current theme."""
    return viz.palette(st.context.theme.type == "dark")


def style() -> str:
    return viz.style_sheet(colours())


def html(fragment: str) -> None:
    """Show HTML made by ``saelab.viz``, which escapes what comes from the corpus."""
    st.html(fragment)


def chart(figure: Any, alt: str, key: str | None = None, **options: Any) -> Any:
    """A figure with its description for screen readers."""
    return st.plotly_chart(figure, theme=None, alt=alt, key=key, config={"displaylogo": False}, **options)


def sidebar() -> None:
    """The choice of the run, shared by all pages."""
    found = workspace()
    names = [name for name, run in found.runs.items() if run.has_weights]
    with st.sidebar:
        if not names:
            st.caption("No SAE below this folder yet.")
            return
        st.session_state["run"] = st.session_state.pop("next_run", st.session_state.get("run"))
        if st.session_state["run"] not in names:
            st.session_state["run"] = names[0]
        st.selectbox("SAE", names, key="run", format_func=lambda name: viz.visible(run_title(found.runs[name])))
        for note in found.runs[st.session_state["run"]].notes:
            st.caption(f":material/info: {viz.markdown(note)}")


def run_title(run: Run) -> str:
    """``name · variant``, for menus; the variant alone where the name says no more."""
    return run.variant if run.name in {".", run.variant} else f"{run.name} · {run.variant}"


def run_page(chosen: Any) -> None:
    """Run a page; a UserError is shown as one line."""
    if chosen.title != "Latent" and "run" in st.session_state:
        # That page writes its own address; changing it twice would add an entry to the browser's history.
        show_link(run=st.session_state["run"])
    try:
        chosen.run()
    except UserError as error:
        st.error(viz.markdown(str(error)), icon=":material/error:")
    except OSError as error:  # of the disk or the network share
        what = (
            f"{error.filename or 'A file'} cannot be read now ({error.strerror or first_line(error)}); reload the page"
        )
        st.error(viz.markdown(what), icon=":material/error:")
