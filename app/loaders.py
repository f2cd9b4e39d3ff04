"""Load and cache what the pages show: the workspace, SAEs, logs, indexes, the language model, comparisons.

Everything returned here is shared by all sessions of the server and must not be changed. The key of a cached object is
the path and the time stamp of its files, so that a run that was trained or indexed again is read again. The language
model carries hooks while it runs: hold :func:`model_lock` to use it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import memory
import streamlit as st
from shared import ModelLock, Recent

from saelab import viz
from saelab.errors import UserError
from saelab.files import protect
from saelab.layout import MAP, METRICS
from saelab.runs import Run
from saelab.workspace import Progress, Workspace, progress, read_metrics
from saelab.workspace import summary as summarise
from saelab.workspace.jobs import Jobs
from saelab.workspace.relatives import chance_cosine, relatives

if TYPE_CHECKING:  # a page loads these when it needs them
    import pandas as pd
    from torch import Tensor

    from saelab.comparison import LatentMatching
    from saelab.features import FeatureIndex, LogitLens
    from saelab.features.finding import Finder
    from saelab.features.poles import AxisScore
    from saelab.prompt.ranking import Known
    from saelab.prompt.reading import Reading
    from saelab.sae import SAE

FOLDER, MODEL, LOADING = "SAELAB_APP_FOLDER", "SAELAB_APP_MODEL", "SAELAB_APP_LOADING"
READ_ONLY = "SAELAB_APP_READ_ONLY"


def read_only() -> bool:
    """Whether nothing may be written into the folder; pages then leave out what would."""
    if os.environ.get(READ_ONLY) != "1":
        return False
    protect(Path(os.environ.get(FOLDER, ".")))  # whatever a page offers
    return True


@st.cache_resource(ttl=5, max_entries=4, show_spinner=False)
def _scan(root: str) -> Workspace:
    return Workspace.scan(root)


def workspace() -> Workspace:
    """The folder the app was started on, scanned anew every few seconds."""
    return _scan(os.environ.get(FOLDER, "."))


@st.cache_resource(max_entries=6, show_spinner=False)
def _opened(path: str, stamp: tuple[float, ...], _run: Run) -> Run:
    return _run.unread()  # the scan's own may hold what stood in the files before they changed


def opened(run: Run) -> Run:
    """The same run with the weights and the index it has read so far, shared by all sessions: never change it."""
    return _opened(str(run.path), run.stamp, run)


def sae(run: Run) -> SAE:
    """The run's SAE, shared by all sessions: never change it."""
    found = opened(run)
    with st.spinner("Loading the SAE …"):
        return found.sae


def place(run: Run) -> Path:
    """The folder or file of a run of the workspace. (Only an SAE in memory has none, and no page shows one.)"""
    assert run.path is not None
    return run.path


@st.cache_data(max_entries=1024, ttl=60, show_spinner=False)  # whether a run is silent changes with time alone
def _summary(path: str, stamp: tuple[float, ...], _run: Run) -> dict[str, Any]:
    return summarise(_run)


def summary(run: Run) -> dict[str, Any]:
    """One row of the overview."""
    return _summary(str(run.path), run.stamp, run)


@st.cache_data(max_entries=32, show_spinner=False)
def _metrics(path: str, size: int) -> list[dict[str, Any]]:
    return read_metrics(Path(path))


def metrics(run: Run) -> list[dict[str, Any]]:
    """The run's log, read again when it has grown."""
    path = place(run) / METRICS
    return _metrics(str(path), path.stat().st_size)


def logged(found: Workspace) -> tuple[dict[str, Progress], list[str]]:
    """How far each run with a log has come, and for each log that cannot be read a line that says why."""
    known, unread = {}, []
    for name, run in found.runs.items():
        try:
            if (at := progress(run)) is not None:
                known[name] = at
        except UserError as error:
            unread.append(str(error))
    return known, unread


def need_index(run: Run, title: str = "") -> FeatureIndex:
    """The run's feature index; without one the page ends, below its title, with the command that builds it."""
    index = opened(run).index
    if index is None:
        if title:
            st.title(title, anchor=False)
        st.info(
            f"`{viz.visible(run.name).replace('`', '')}` has no finished feature index. "
            "Build it: `saelab index RUN --cache CACHE`.",
            icon=":material/info:",
        )
        st.stop()
    return index


@st.cache_resource(max_entries=6, show_spinner="Reading the feature index …")
def _catalogue(path: str, stamp: tuple[float, ...], _index: FeatureIndex) -> pd.DataFrame:
    from saelab.features.search import catalogue

    return catalogue(_index)


def catalogue(run: Run) -> pd.DataFrame:
    """All latents as a table, one row per latent and pole: shared by all sessions, never change it."""
    return _catalogue(str(run.path), run.stamp, need_index(run))


@st.cache_resource(max_entries=6, show_spinner=False)
def _known(path: str, stamp: tuple[float, ...], _index: FeatureIndex) -> Known:
    from saelab.prompt.ranking import Known

    return Known.of(_index.table(), _index.d_sae, _index.meta["tokens"])


def known(run: Run) -> Known:
    """Each latent's maximum and density in the corpus."""
    return _known(str(run.path), run.stamp, need_index(run))


def reads_alike(run: Run, name: str) -> bool:
    """Whether the activations of one text serve both SAEs: of the same hook point, with or without a BOS token."""
    other = workspace().runs[name]
    return bool(run.metadata.get("prepend_bos", True)) == bool(other.metadata.get("prepend_bos", True))


@st.cache_resource(max_entries=6, show_spinner=False)
def _latent_map(path: str, stamp: tuple[float, ...], made: float, _run: Run) -> pd.DataFrame | None:
    from saelab.features.projection import load_map

    return load_map(path, opened(_run).fingerprint)


def latent_map(run: Run) -> pd.DataFrame | None:
    """Where each latent lies on the map; None where no map of these weights was made. Never change it."""
    path = place(run) / MAP
    return _latent_map(str(run.path), run.stamp, path.stat().st_mtime, run) if path.is_file() else None


@st.cache_resource(max_entries=6, show_spinner="Reading what latents fire on …")
def _finder(path: str, stamp: tuple[float, ...], _index: FeatureIndex, _table: pd.DataFrame) -> Finder:
    from saelab.features.finding import Finder

    return Finder(_index, _table)


def finder(run: Run) -> Finder:
    """The search of a run's index: shared by all sessions."""
    return _finder(str(run.path), run.stamp, need_index(run), catalogue(run))


@st.cache_resource(show_spinner=False)
def jobs() -> Jobs:
    """What the server computes beside the pages."""
    return Jobs()


@st.cache_resource(show_spinner=False)
def model_lock() -> ModelLock:
    """The one lock of the server's model."""
    return ModelLock()


@st.cache_resource(max_entries=1, show_spinner="Loading the language model …")
def _model(name: str, dtype: str, revision: str | None) -> Any:
    import transformer_lens.model_bridge  # noqa: F401  # loaded with the model, but stays

    from saelab.lm import load_model

    memory.keep("packages of models", last=True)
    given = _loading()
    return load_model(
        name, dtype=dtype, revision=revision, device=given.get("device", "auto"), device_map=given.get("device_map")
    )


_KEYS: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()


def model_key(model: Any) -> tuple[str, ...]:
    """Weights and precision of a loaded model: several revisions and precisions have one name."""
    from saelab.lm.fingerprint import dtype_name, model_dtype, weights_fingerprint

    if model not in _KEYS:
        _KEYS[model] = weights_fingerprint(model), dtype_name(model_dtype(model))
    return _KEYS[model]


@st.cache_data(max_entries=256, show_spinner="Comparing the model's weights …")
def _other_weights(path: str, stamp: tuple[float, ...], key: tuple[str, ...], _run: Run, _loaded: Any) -> str:
    """Why the model is not the one that the run was trained on; empty where it is."""
    from saelab.lm.record import check_weights
    from saelab.runs.language_model import model_record

    try:
        check_weights(_loaded, model_record(_run, workspace().root), f"the SAE {_run.name}", any_weights=False)
    except UserError as error:
        return str(error)
    return ""


def _loading() -> dict[str, Any]:
    """How ``saelab app`` was told to load the model."""
    return json.loads(os.environ.get(LOADING, "{}"))


def model_name(run: Run) -> str | None:
    """The model that this session may load: the one given to ``saelab app``, else a trusted one that the run names."""
    given = os.environ.get(MODEL)
    return (None if given == "none" else given) if given else workspace().model_of(run)


def need_model(run: Run, purpose: str) -> Any:
    """The run's language model; without one the page ends and says why and what to do."""
    if not run.metadata.get("hook_name"):
        st.info(
            f"{purpose} needs the hook point, which {viz.markdown(run.name)} does not record. "
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
    from saelab.lm.record import load_settings
    from saelab.runs.language_model import model_record

    given = _loading()
    dtype, revision = load_settings(
        model_record(run, workspace().root), name, given.get("model_dtype"), given.get("revision")
    )
    model = _model(name, dtype, revision)
    wrong = "" if given.get("any_weights") else _other_weights(str(run.path), run.stamp, model_key(model), run, model)
    if wrong:
        st.error(viz.markdown(wrong), icon=":material/error:")
        st.stop()
    return model


@st.cache_resource(max_entries=1, show_spinner=False)
def _lens(model: tuple[str, ...], _model: Any) -> LogitLens:
    from saelab.features import LogitLens
    from saelab.lm import unembedding

    end = unembedding(_model)
    return LogitLens(end.weight, end.norm_weight, end.centred)


@st.cache_data(max_entries=256, show_spinner=False)
def _promoted(model: tuple[str, ...], key: bytes, count: int, _direction: Tensor, _model: Any) -> list[str]:
    from saelab.lm.tokens import token_text

    (_, ids), _ = _lens(model, _model).extremes(_direction[None].float(), count)
    return [token_text(_model.tokenizer, token) for token in ids[0].tolist()]


def promoted(model: Any, direction: Tensor, count: int) -> list[str]:
    """Tokens that a direction raises most, by the logit lens of the loaded model."""
    return _promoted(model_key(model), direction.numpy().tobytes(), count, direction, model)


def logit_effects(run: Run, direction: Tensor) -> Tensor:
    """How a direction at the run's hook point moves every logit, by the logit lens of the model; needs the model."""
    model = need_model(run, "The histogram of all logits")
    return _lens(model_key(model), model).effects(direction[None].float())[0]


def read_text(run: Run, text: str, purpose: str, gradients: bool = False) -> Reading:
    """A text inside the model and the run's SAE; needs the model and holds its lock."""
    from saelab.prompt.reading import read_prompt
    from saelab.runs.language_model import untrained_start

    model = need_model(run, purpose)
    meta = run.metadata
    with model_lock(), st.spinner("Running the model …"):
        return read_prompt(
            model,
            sae(run),
            text,
            meta["hook_name"],
            bos=bool(meta.get("prepend_bos", True)),
            skip_first=untrained_start(run),
            gradients=gradients,
            hook_name_out=meta.get("hook_name_out", ""),
        )


def siblings(run: Run, most: int = 4) -> dict[str, Run]:
    """A few other SAEs of the folder on the same hook point and width, those of another seed first."""
    return dict(list(relatives(run, workspace().runs).items())[:most])


@st.cache_data(max_entries=256, show_spinner=False)
def _chance(key: tuple[Any, ...], _left: Run, _right: Run) -> float:
    return chance_cosine(sae(_left), sae(_right))


def chance(left: Run, right: Run) -> float:
    """The cosine that a random direction has with the closest latent of ``right``."""
    return _chance((str(left.path), left.stamp, str(right.path), right.stamp), left, right)


@st.cache_resource(show_spinner=False)
def _matchings() -> Recent:
    return Recent(8)


def matching(left: Run, right: Run, compute: bool) -> LatentMatching | None:
    """The latents of two SAEs matched, by activations as well where both were trained on a cache of the folder.

    Large SAEs take a minute, so it is done only where ``compute`` says so, with a bar, and kept; None where it is not.
    """
    from saelab.comparison import match_saes

    cache = workspace().cache_of(left)
    if cache is not None and cache.fingerprint != right.metadata.get("cache_fingerprint"):
        cache = None
    # What was matched without activations is not what would be with a cache that came later.
    key = (str(left.path), left.stamp, str(right.path), right.stamp, cache and cache.fingerprint)
    known = _matchings().get(key)
    if known is not None or not compute:
        return known
    bar = st.progress(0.0, "Matching latents …")
    found = match_saes(
        sae(left), sae(right), cache, tokens=16_384, progress=lambda done, what: bar.progress(done, f"{what} …")
    )
    bar.empty()
    return _matchings().keep(key, found)


@st.cache_data(max_entries=512, show_spinner="Comparing the poles …")
def _axis(path: str, stamp: tuple[float, ...], latent: int, _index: FeatureIndex) -> AxisScore:
    from saelab.features.poles import axis_score

    return axis_score(_index, latent)


def axis(run: Run, latent: int) -> AxisScore:
    """Whether the two poles of a latent are one axis or two features."""
    return _axis(str(run.path), run.stamp, latent, need_index(run))
