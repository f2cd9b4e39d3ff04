"""What the pages share: the workspace, cached loaders, the chosen run and latent, the lock on the model."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import streamlit as st

from saelab import viz
from saelab.errors import UserError
from saelab.layout import METRICS
from saelab.runs import Run
from saelab.workspace import Workspace, read_metrics

FOLDER, MODEL = "SAELAB_APP_FOLDER", "SAELAB_APP_MODEL"
KEEP: dict[str, Any] = {"persist_state": "session"}  # what is typed and chosen outlives a visit to another page


@st.cache_resource(ttl=5, max_entries=4, show_spinner=False)
def _scan(root: str) -> Workspace:
    return Workspace.scan(root)


def workspace() -> Workspace:
    """The folder the app was started on, scanned anew every few seconds."""
    return _scan(os.environ.get(FOLDER, "."))


def colours() -> viz.Palette:
    """The palette of the theme the reader sees."""
    return viz.palette(st.context.theme.type == "dark")


def html(fragment: str) -> None:
    """Show HTML made by ``saelab.viz``, which escapes what comes from the corpus."""
    st.html(fragment)


def style() -> str:
    return viz.style_sheet(colours())


def chart(figure: Any, alt: str, key: str | None = None, **options: Any) -> Any:
    """A figure with its description for screen readers."""
    return st.plotly_chart(figure, theme=None, alt=alt, key=key, config={"displaylogo": False}, **options)


def follow_link() -> None:
    """Take run, latent and pole from the address, when it is not the one we wrote ourselves."""
    params = st.query_params.to_dict()
    if not params or params == st.session_state.get("address"):
        return
    if params.get("run") in workspace().runs:
        st.session_state["run"] = params["run"]
    for name in ("latent", "pole"):
        if params.get(name, "").lstrip("-").isdigit():
            st.session_state[name] = int(params[name])


def show_link(**params: Any) -> None:
    """Write the state into the address, so that it can be shared."""
    address = {name: str(value) for name, value in params.items()}
    st.session_state["address"] = address
    if st.query_params.to_dict() != address:
        st.query_params.from_dict(address)


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
        st.selectbox("SAE", names, key="run", format_func=lambda name: viz.visible(describe(found.runs[name])))


def describe(run: Run) -> str:
    """``name · variant``, for menus; the variant alone where the name says no more."""
    return run.variant if run.name in {".", run.variant} else f"{run.name} · {run.variant}"


def run_page(page: Any) -> None:
    """Run a page; a mistake the user can mend is shown as one line."""
    if page.title != "Latent" and "run" in st.session_state:
        # That page's address says more, and one that changes twice would add to the browser's history.
        show_link(run=st.session_state["run"])
    try:
        page.run()
    except UserError as error:
        st.error(viz.markdown(str(error)), icon=":material/error:")


def need_run() -> Run:
    """The chosen run; without one the page ends with what to do."""
    found = workspace()
    if "run" not in st.session_state or st.session_state["run"] not in found.runs:
        st.info(
            f"There is no SAE below `{found.root.name}` yet. "
            f"Train one into it: `saelab train CACHE --out {found.root.name}/run`.",
            icon=":material/info:",
        )
        st.stop()
    return found.runs[st.session_state["run"]]


@st.cache_resource(max_entries=6, show_spinner=False)
def _opened(path: str, stamp: tuple[float, ...], _run: Run) -> Run:
    return _run


def opened(run: Run) -> Run:
    """The same run with the weights and the index it has read so far, shared by all sessions: never change it."""
    return _opened(str(run.path), run.stamp, run)


def sae(run: Run) -> Any:
    """The run's SAE, shared by all sessions: never change it."""
    found = opened(run)
    with st.spinner("Loading the SAE …"):
        return found.sae


@st.cache_data(max_entries=32, show_spinner=False)
def _metrics(path: str, size: int) -> list[dict[str, Any]]:
    return read_metrics(Path(path))


def metrics(run: Run) -> list[dict[str, Any]]:
    """The run's log, read again when it has grown."""
    path = run.path / METRICS
    return _metrics(str(path), path.stat().st_size)


def need_index(run: Run) -> Any:
    """The run's feature index; without one the page ends with the command that builds it."""
    if not run.has_index:
        st.info(
            f"`{viz.visible(run.name).replace('`', '')}` has no finished feature index. "
            "Build it: `saelab index RUN --cache CACHE`.",
            icon=":material/info:",
        )
        st.stop()
    return opened(run).index


@st.cache_resource(max_entries=6, show_spinner="Reading the feature index …")
def _catalogue(path: str, stamp: tuple[float, ...], _index: Any) -> Any:
    from saelab.features.search import catalogue

    return catalogue(_index)


def catalogue(run: Run) -> Any:
    """All latents as a table, one row per latent and pole: shared by all sessions, never change it."""
    return _catalogue(str(run.path), run.stamp, need_index(run))


@st.cache_resource(show_spinner=False)
def model_lock() -> threading.RLock:
    """Hooks are state on the model, and the model is shared: whoever computes with it holds this."""
    return threading.RLock()


@st.cache_resource(max_entries=1, show_spinner="Loading the language model …")
def _model(name: str) -> Any:
    from saelab.lm import load_model

    return load_model(name)


def model_name(run: Run) -> str | None:
    """The model this session may load: the one given to ``saelab app``, else one the run names and we trust."""
    given = os.environ.get(MODEL)
    return (None if given == "none" else given) if given else workspace().model_of(run)


def need_model(run: Run, purpose: str) -> Any:
    """The run's language model; without one the page ends and says why and what to do."""
    if not run.metadata.get("hook_name"):
        st.info(
            f"{purpose} needs the hook point, and {viz.markdown(run.name)} does not record its own. "
            "Index it over a cache of that hook point (`saelab index RUN --cache CACHE`): then it is known.",
            icon=":material/info:",
        )
        st.stop()
    name = model_name(run)
    if name is None:
        wanted = run.metadata.get("model_name")
        given = f" The SAE was trained on {viz.markdown(str(wanted))}." if wanted else ""
        st.info(
            f"{purpose} needs the language model, and none is loaded.{given} "
            "Start the app with `saelab app DIR --model NAME`.",
            icon=":material/info:",
        )
        st.stop()
    with model_lock():
        return _model(name)


@st.cache_resource(max_entries=1, show_spinner=False)
def _lens(name: str, _model: Any) -> Any:
    from saelab.features import LogitLens
    from saelab.lm import unembedding

    end = unembedding(_model)
    return LogitLens(end.weight, end.norm_weight, end.centred)


@st.cache_data(max_entries=256, show_spinner=False)
def _promoted(name: str, key: bytes, count: int, _direction: Any, _model: Any) -> list[str]:
    (_, ids), _ = _lens(name, _model).extremes(_direction[None].float(), count)
    return [_model.tokenizer.decode([token]) for token in ids[0].tolist()]


def promoted(run: Run, model: Any, direction: Any, count: int) -> list[str]:
    """Tokens that a direction at the run's hook point raises most, by the logit lens of the loaded model."""
    return _promoted(str(model_name(run)), direction.numpy().tobytes(), count, direction, model)


def read_text(run: Run, text: str, purpose: str, gradients: bool = False) -> Any:
    """A text inside the model and the run's SAE; needs the model and holds its lock."""
    from saelab.prompt.reading import read

    model = need_model(run, purpose)
    meta = run.metadata
    with model_lock(), st.spinner("Running the model …"):
        return read(
            model, sae(run), text, meta["hook_name"], bos=bool(meta.get("prepend_bos", True)), gradients=gradients
        )


def _distance(run: Run, other: Run) -> tuple[bool, ...]:
    """How unlike two SAEs are, for sorting: another variant, another width, nothing known of its latents."""
    return other.variant != run.variant, other.d_sae != run.d_sae, not other.has_index


def siblings(run: Run, most: int = 4) -> dict[str, Run]:
    """Other SAEs of the folder on the same hook point and width, a few of them, those most like it first."""
    same = {
        name: other
        for name, other in workspace().runs.items()
        if name != run.name
        and other.has_weights
        and other.config.get("d_in") == run.config.get("d_in")
        and other.metadata.get("hook_name") == run.metadata.get("hook_name")
    }
    alike = sorted(same.items(), key=lambda item: _distance(run, item[1]))
    return dict(alike[:most])


@st.cache_data(max_entries=8, show_spinner="Matching latents …")
def _matching(key: tuple[Any, ...], _left: Run, _right: Run) -> Any:
    from saelab.comparison import match_saes

    cache = workspace().cache_of(_left)
    if cache is not None and cache.fingerprint != _right.metadata.get("cache_fingerprint"):
        cache = None
    return match_saes(sae(_left), sae(_right), cache, tokens=16_384)


def matching(left: Run, right: Run) -> Any:
    """The latents of two SAEs matched, by activations as well where both were trained on a cache of the folder."""
    return _matching((str(left.path), left.stamp, str(right.path), right.stamp), left, right)


@st.cache_data(max_entries=512, show_spinner="Comparing the poles …")
def _axis(path: str, stamp: tuple[float, ...], latent: int, _index: Any) -> Any:
    from saelab.features.poles import axis_score

    return axis_score(_index, latent)


def axis(run: Run, latent: int) -> Any:
    """Whether the two poles of a latent are one axis or two features."""
    return _axis(str(run.path), run.stamp, latent, need_index(run))


def steer_with(run: Run, latent: int, pole: int) -> None:
    """Go to the Steering page with this latent picked."""
    st.session_state["steer_pick"] = (run.name, int(latent), int(pole))
    st.switch_page("views/steering.py")


def open_latent(latent: int, pole: int = 1, run: Run | None = None) -> None:
    """Go to a latent's page, of another run where one is given."""
    st.session_state["latent"], st.session_state["pole"] = int(latent), int(pole)
    if run is not None and run.name != st.session_state.get("run"):
        # The sidebar's widget exists by now in this pass; its choice is taken over at the start of the next.
        st.session_state["next_run"] = run.name
    st.switch_page("views/latent.py")
