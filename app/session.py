"""The state of a session: the chosen run and latent, the address that holds them, and links to other pages."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, TypedDict

import streamlit as st
from loaders import workspace

from saelab.runs import Run


class Keep(TypedDict):
    """A widget's option; a typed dictionary, so that the type of the widget's value is still inferred."""

    persist_state: Literal["session"]


KEEP: Keep = {"persist_state": "session"}  # the input is kept while another page is visited


def follow_link() -> None:
    """Take run, latent and pole from the address, unless this session wrote it."""
    params = st.query_params.to_dict()
    if not params or params == st.session_state.get("address"):
        return
    if params.get("run") in workspace().runs:
        st.session_state["run"] = params["run"]
    for name in ("latent", "pole"):
        with contextlib.suppress(ValueError):  # an address may hold anything
            st.session_state[name] = int(params.get(name, ""))


def show_link(**params: Any) -> None:
    """Write the state into the address, so that it can be shared."""
    address = {name: str(value) for name, value in params.items()}
    st.session_state["address"] = address
    if st.query_params.to_dict() != address:
        st.query_params.from_dict(address)


def need_run() -> Run:
    """The chosen run; without one the page ends with the command that makes one."""
    found = workspace()
    if "run" not in st.session_state or st.session_state["run"] not in found.runs:
        st.info(
            f"There is no SAE below `{found.root.name}` yet. "
            f"Train one into it: `saelab train CACHE --out {found.root.name}/run`.",
            icon=":material/info:",
        )
        st.stop()
    return found.runs[st.session_state["run"]]


def open_latent(latent: int, pole: int = 1, run: Run | None = None) -> None:
    """Go to a latent's page, of another run where one is given."""
    st.session_state["latent"], st.session_state["pole"] = int(latent), int(pole)
    if run is not None and run.name != st.session_state.get("run"):
        # The sidebar's widget has been drawn in this pass; its choice is set at the start of the next.
        st.session_state["next_run"] = run.name
    st.switch_page("views/latent.py")


def steer_with(run: Run, latent: int, pole: int) -> None:
    """Go to the Steering page with this latent picked."""
    st.session_state["steer_pick"] = (run.name, int(latent), int(pole))
    st.switch_page("views/steering.py")
