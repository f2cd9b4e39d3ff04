"""What all pages share: colours, style sheet, figures, the sidebar, and the code that runs a page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import session
import streamlit as st
from loaders import workspace

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


def to_top(seen: str) -> None:
    """Scroll up where something else is shown than in the pass before: the browser keeps the place on the page."""
    place = st.container()  # there in every pass, so that what follows keeps its position
    if st.session_state.get("seen") == seen:
        return
    st.session_state["seen"] = seen
    # The text differs each time, or the script would not run again; the number holds nothing of the reader's.
    count = st.session_state["seen_count"] = st.session_state.get("seen_count", 0) + 1
    script = f"document.querySelector('[data-testid=stMain]')?.scrollTo(0, 0); /* {count} */"
    place.html(f"<script>{script}</script>", unsafe_allow_javascript=True)


# Streamlit writes the address that a button leads to onto the page that is left, as an entry of its own in the history
# of the browser, before it goes to the other page: Back would come to that entry, which has nothing that was set there.
# What a page adds to its address as it is drawn for the first time would be a further entry.
_ONE_STEP = r"""
if (!window.saelabOneStep) {
  window.saelabOneStep = true;
  const { pushState, replaceState } = history;
  let led = null;  // the query of the page that is on its way
  let arrived = false;  // on this page, where nothing was pressed yet
  for (const event of ['pointerdown', 'keydown']) addEventListener(event, () => { arrived = false; }, true);
  const writes = (own) => function (state, title, to) {
    const url = new URL(to ?? '', location.href), here = url.pathname === location.pathname;
    const query = url.search.replace(/([?&])LED=1(?:&|$)/, '$1').replace(/[?&]$/, '');
    const marked = query !== url.search;
    if (marked) led = query;
    // Also without the mark, which is taken off before the browser has the new path.
    if (here && query === led) return undefined;
    led = null;
    const write = here && arrived ? replaceState : own;
    arrived ||= !here;
    return write.call(history, state, title, marked ? url.pathname + query + url.hash : to);
  };
  history.pushState = writes(pushState);
  history.replaceState = writes(replaceState);
}
""".replace("LED", session.LED)


def one_step() -> None:
    """Have a button that leads to another page be one step of the browser's history, as a link is."""
    st.html(f"<script>{_ONE_STEP}</script>", unsafe_allow_javascript=True)


def chart(figure: Any, alt: str, key: str | None = None, **options: Any) -> Any:
    """A figure with its description for screen readers."""
    return st.plotly_chart(figure, theme=None, alt=alt, key=key, config={"displaylogo": False}, **options)


def sidebar(pages: Mapping[str, Sequence[Any]]) -> None:
    """The menu, and the choice of the run, shared by all pages."""
    found = workspace()
    names = [name for name, run in found.runs.items() if run.has_weights]
    with st.sidebar:
        one_step()
        menu = st.container()
        if names:
            choose_run(found.runs, names)
        else:
            st.caption("No SAE below this folder yet.")
        with menu:
            links(pages)


def links(pages: Mapping[str, Sequence[Any]]) -> None:
    """The pages; the address of each has the run and what was set there: written later it would be a step of Back."""
    run, latent = st.session_state.get("run"), st.session_state.get("latent")
    for section, members in pages.items():
        st.caption(section)
        for page in members:
            params: dict[str, Any] = session.of_address(page.title)
            params |= {} if run is None else {"run": run}
            if page.title == "Latent" and run is not None and latent is not None:
                params |= {"latent": str(latent), "pole": str(st.session_state.get("pole", 1))}
            st.page_link(page, query_params=params, width="stretch")


def choose_run(runs: Mapping[str, Run], names: list[str]) -> None:
    """The menu of SAEs. One that is not there is not replaced by another one."""
    wanted = st.session_state.pop("next_run", st.session_state.get("run"))
    if wanted is None and session.missing_run() is None:
        # The widest of those that can be explored, the first of several.
        wanted = max(names, key=lambda name: (runs[name].has_index, runs[name].d_sae or 0))
    if wanted is not None:
        st.session_state["missing_run"] = None if wanted in names else wanted
    st.session_state["run"] = wanted if wanted in names else None
    # Without a first choice the menu could be emptied, which means nothing where there is an SAE.
    first = None if st.session_state["run"] is None else 0
    st.selectbox(
        "SAE", names, first, key="run", format_func=lambda name: viz.visible(run_title(runs[name])), placeholder="none"
    )
    if wanted in names:
        for note in runs[wanted].notes:
            st.caption(f":material/info: {viz.markdown(note)}")


def run_title(run: Run) -> str:
    """``name · variant``, for menus; the variant alone where the name says no more."""
    return run.variant if run.name in {".", run.variant} else f"{run.name} · {run.variant}"


def run_page(chosen: Any) -> None:
    """Run a page; a UserError is shown as one line."""
    session.draw_page(chosen.title)
    if session.missing_run() is not None:
        session.say_missing()
    elif chosen.title != "Latent" and st.session_state.get("run") is not None:
        # That page writes its own address; changing it twice would add an entry to the browser's history.
        session.show_link(run=st.session_state["run"])
    with part():
        chosen.run()


@contextlib.contextmanager
def part() -> Iterator[None]:
    """A page, or a piece of one that may fail alone: its error is shown in its place, in one line."""
    try:
        yield
    except UserError as error:
        st.error(viz.markdown(str(error)), icon=":material/error:")
    except OSError as error:  # of the disk or the network share
        what = (
            f"{error.filename or 'A file'} cannot be read now ({error.strerror or first_line(error)}); reload the page"
        )
        st.error(viz.markdown(what), icon=":material/error:")
