"""The state of a session: the chosen run and latent, the address that holds them, and links to other pages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, TypedDict
from urllib.parse import quote

import streamlit as st
from loaders import workspace

from saelab import viz
from saelab.runs import Run


class Keep(TypedDict):
    """A widget's option; a typed dictionary, so that the type of the widget's value is still inferred."""

    persist_state: Literal["session"]


OUTDATED = ":material/history:"  # the icon of a line that says that what is shown was made with something else
CHANGED = "The SAE's files have changed since"
KEEP: Keep = {"persist_state": "session"}  # the input is kept while another page is visited


class Held(TypedDict):
    """The options of a widget whose value is part of the address."""

    key: str
    bind: Literal["query-params"] | None
    persist_state: Literal["session"]


LONGEST = 1500  # characters of an address that texts may take: with the rest, 2,000 are safe everywhere


def held(key: str, default: Any = None, text: Callable[[Any], str] = str) -> Held:
    """Have a widget's value stand in the address, so that reloading and sharing the page lose nothing.

    ``default`` is the widget's own, which the address leaves out, and ``text`` its ``format_func``. Links to the page
    hold the value too: were it written on arrival, Back would have one step more to go.
    """
    _of_page()[key] = (default, text)
    return {"key": key, "bind": "query-params", "persist_state": "session"}


def held_text(key: str, default: str = "") -> Held:
    """:func:`held` for a text, as long as the address has room for it; :func:`say_unshared` tells where it has not."""
    text = str(st.session_state.get(key) or "")
    size = 0 if text == default else len(quote(text))
    used: dict[str, int] = st.session_state.setdefault("address_texts", {})
    used[key] = 0
    if sum(used.values()) + size > LONGEST:
        _of_page().pop(key, None)
        return {"key": key, "bind": None, "persist_state": "session"}
    used[key] = size
    return held(key, default)


def say_unshared(*keys: str) -> None:
    """Say which text is too long for an address; call it below the fields."""
    page = _of_page()
    if any(key not in page for key in keys):
        st.caption("The text is too long for an address: a link to this page leaves it out.")


def of_address(page: str) -> dict[str, str | list[str]]:
    """What the widgets of a page hold, as its address writes it."""
    found: dict[str, str | list[str]] = {}
    for key, (default, text) in st.session_state.get("held", {}).get(page, {}).items():
        value = st.session_state.get(key)
        if value is None or value == default or (isinstance(value, str | list) and not value):
            continue
        several = isinstance(value, list | tuple)
        found[key] = [_written(one, text) for one in value] if several else _written(value, text)
    return found | ({"pick": st.session_state["steering_address"][1]} if _has_picks(page) else {})


def _has_picks(page: str) -> bool:
    """Whether the page is that of picks, and they are of the chosen SAE."""
    name, texts = st.session_state.get("steering_address", (None, []))
    return page == "Steering" and bool(texts) and name == st.session_state.get("run")


def _written(value: Any, text: Callable[[Any], str]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    whole = isinstance(value, float) and value.is_integer() and text is str
    return str(int(value)) if whole else text(value)


def _of_page() -> dict[str, Any]:
    """The widgets of the page being drawn whose values stand in its address."""
    return st.session_state.setdefault("held", {}).setdefault(st.session_state.get("page", ""), {})


def draw_page(title: str) -> None:
    """A page begins to be drawn; the browser has its path by now."""
    if LED in st.query_params:
        del st.query_params[LED]
    st.session_state["page"] = title
    st.session_state["address_texts"] = {}


ADDRESS = ("run", "latent", "pole")  # what an address can hold; widgets that are bound to it add their own
LED = "led"  # in the address that a button leads to, until its page is drawn: see page.one_step


def follow_link() -> None:
    """Take run, latent and pole from the address, unless this session wrote it."""
    params = st.query_params.to_dict()
    known = {name: params[name] for name in ADDRESS if name in params}
    if not known or known == st.session_state.get("address"):
        return
    st.session_state["address"] = known
    st.session_state.pop("faulty_link", None)
    if "run" in known:
        st.session_state["run"] = known["run"]
    for name in ("latent", "pole"):
        if name in known:
            try:
                st.session_state[name] = int(known[name])
            except ValueError:  # an address may hold anything
                st.session_state["faulty_link"] = f"{name} {viz.visible(known[name][:40])}"


def faulty_link() -> str:
    """What in the address was no number, said once; empty where all was well."""
    return st.session_state.pop("faulty_link", "")


def address(**params: Any) -> dict[str, str]:
    """What to write into the address of a page, noted as this session's own."""
    found = {name: str(value) for name, value in params.items()}
    st.session_state["address"] = found
    return found


def show_link(**params: Any) -> None:
    """Write the state into the address, so that it can be shared."""
    wanted = address(**params)
    there = st.query_params.to_dict()
    if {name: value for name, value in there.items() if name in ADDRESS} == wanted:
        return
    if there.keys() <= set(ADDRESS):
        # One change at a time would be one entry each in the history of the browser.
        st.query_params.from_dict(wanted)
        return
    for name in ADDRESS:  # what widgets are bound to cannot be written again
        if name in wanted:
            st.query_params[name] = wanted[name]
        elif name in there:
            del st.query_params[name]


def missing_run() -> str | None:
    """The SAE that a link names, or that was open until now, and that is not in the folder."""
    return st.session_state.get("missing_run")


def say_missing() -> None:
    """Say that the SAE of the address is not there: showing another in its place would pass for it."""
    name, found = str(missing_run()), workspace()
    why = "has no weights yet" if name in found.runs else f"is not below {found.root.name}"
    st.error(
        f"The SAE **{viz.markdown(name)}**, which this address names, {why}. Choose one in the side bar.",
        icon=":material/link_off:",
    )


def say_left_out(key: str, taken: Collection[str], why: Callable[[Run], str]) -> None:
    """Say which further SAEs an address names that a page cannot take; call it before the field of that key.

    A field drops what it does not know, and would show its default as if that had been asked for. ``taken`` are the
    names that it knows; ``why`` says of any other SAE of the folder what keeps it out.
    """
    runs, root = workspace().runs, workspace().root.name
    for text in st.query_params.get_all(key):
        name = _named(text, runs)
        if name in taken:
            continue
        said = f"**{viz.markdown(text[:80] if name is None else name)}**"
        reason = f"not below {root}." if name is None else f"left out, because {viz.markdown(why(runs[name]))}."
        st.warning(f"This address also names {said}: {reason}", icon=":material/link_off:")


def renew(key: str, described: Callable[[str], str], known: Collection[str]) -> None:
    """Have a field find an SAE whose description in the address was true once, as that of a seed; call it before it."""
    text = st.query_params.get(key)
    name = None if text is None else _named(text, known)
    if name is not None and described(name) != text and st.session_state.get(key) is None:
        st.session_state[key] = name


def _named(text: str, names: Collection[str]) -> str | None:
    """The SAE that a field's text means: it may show more than the name; of several that begin alike the longest."""
    found = [name for name in names if any(f"{text} ".startswith(f"{said} ") for said in (name, viz.visible(name)))]
    return max(found, key=len, default=None)


def say_unknown(key: str, known: Collection[str]) -> None:
    """Say what else an address names that is not in the folder, in whose place the field of that key shows another."""
    there = {viz.visible(name) for name in known}
    for text in st.query_params.get_all(key):
        if text not in there:
            said, root = viz.markdown(text[:80]), workspace().root.name
            st.warning(f"This address also names **{said}**: not below {root}.", icon=":material/link_off:")


def say_empty() -> None:
    """Say that the folder holds no SAE, and which command makes one."""
    name = workspace().root.name
    st.info(
        f"There is no SAE below `{name}` yet. Train one into it: `saelab train CACHE --out {name}/run`.",
        icon=":material/info:",
    )


def need_run() -> Run:
    """The chosen run; without one the page ends with the command that makes one."""
    found = workspace()
    if missing_run() is not None:
        st.stop()  # run_page has said it
    if st.session_state.get("run") not in found.runs:
        say_empty()
        st.stop()
    return found.runs[st.session_state["run"]]


def open_latent(latent: int, pole: int = 1, run: Run | None = None) -> None:
    """Go to a latent's page, of another run where one is given."""
    st.session_state["latent"], st.session_state["pole"] = int(latent), int(pole)
    name = st.session_state.get("run") if run is None else run.name
    if name != st.session_state.get("run"):
        # The sidebar's widget has been drawn in this pass; its choice is set at the start of the next.
        st.session_state["next_run"] = name
    # With the address in the same step: writing it afterwards would ask for a second press of Back.
    _go("Latent", "views/latent.py", run=name, latent=int(latent), pole=int(pole))


def steer_with(run: Run, latent: int, pole: int) -> None:
    """Go to the Steering page with this latent picked."""
    st.session_state["steer_pick"] = (run.name, int(latent), int(pole))
    _go("Steering", "views/steering.py", run=run.name)


def steer_all(run: Run, picks: list[tuple[int, int]], operation: str) -> None:
    """Go to the Steering page with several latents picked, to apply ``operation`` with each."""
    st.session_state["steer_picks"] = (run.name, picks, operation)
    if run.name != st.session_state.get("run"):
        st.session_state["next_run"] = run.name
    _go("Steering", "views/steering.py", run=run.name)


def _go(title: str, view: str, **params: Any) -> None:
    elsewhere = {} if st.session_state.get("page") == title else {LED: "1"}
    st.switch_page(view, query_params={**elsewhere, **of_address(title), **address(**params)})
