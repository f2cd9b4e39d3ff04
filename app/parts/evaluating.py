"""A new evaluation of steering: what is compared, what it costs, and how far it is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import loaders
import page
import session
import streamlit as st

from saelab import viz
from saelab.errors import UserError
from saelab.features.explanations import ChatClient
from saelab.features.explanations.requests import KeptAnswers
from saelab.lm.tokens import tokenizer_of
from saelab.runs import Run
from saelab.steering import Recipe
from saelab.steering.evaluation.answers import Row, Steered, generate_rows
from saelab.steering.evaluation.concepts import pick_concepts, shipped_concepts, shipped_instructions
from saelab.steering.evaluation.config import DEFAULT, SteerEvalConfig
from saelab.steering.evaluation.evaluate import JUDGED, SETTINGS, Evaluation
from saelab.steering.evaluation.methods import METHODS, PROMPTS, Setting
from saelab.steering.evaluation.report import evaluate_steering, save_partly
from saelab.workspace import recipes
from saelab.workspace.jobs import Job, Stopped

EVALUATIONS = "evaluations"  # the folder, below that which is open
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)
USUAL, FEW = [0.5, 1.0, 2.0], 2  # strengths and concepts at first
REQUESTS = 2000
WHAT = "Strengths as multiples of the budget of damage: each direction is calibrated to it on neutral texts."


def form(run: Run, opened: bool) -> None:
    """The questions before an evaluation, its cost, and the button that starts it."""
    if loaders.read_only():
        st.caption("No evaluation can be started here: this app was started with --read-only.")
        return
    if (job := loaders.jobs().running()) is not None:
        watch(job.name)
        return
    ended()
    with st.expander("New evaluation", icon=":material/add:", expanded=opened):
        config, concepts, recipe, name = questions()
        if config is None:
            return
        count = answers(config, len(concepts))
        judge = judged(count)
        st.caption(f"{count:,} answers, {count * config.max_new_tokens:,} tokens at most." + took(run, config, count))
        with st.container(horizontal=True):
            if st.button("Estimate the time", key="eval_estimate", icon=":material/timer:"):
                estimate(run, config)
                st.rerun()
            if st.button("Start", key="eval_start", icon=":material/play_arrow:", type="primary"):
                start(run, folder_of(name), config, concepts, recipe, judge)
                st.rerun()


def questions() -> tuple[SteerEvalConfig | None, list[str], str | None, str]:
    """What to compare; no settings where they cannot be used, which is said."""
    root = loaders.workspace().root
    saved = [row["folder"] for row in recipes.saved_recipes(root)]
    known = [name for name in METHODS if name != "recipe" or saved]
    named = [concept.name for concept in shipped_concepts()]
    methods = st.multiselect("methods", known, list(DEFAULT), **session.held("eval_methods", list(DEFAULT)))
    recipe = None
    if "recipe" in methods:
        recipe = st.selectbox("recipe", saved, **session.held("eval_recipe", saved[0]))
    concepts = st.multiselect("concepts", named, named[:FEW], **session.held("eval_concepts", named[:FEW]))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        most = len(shipped_instructions())
        number = st.number_input("instructions", 2, most, 10, width=120, **session.held("eval_instructions", 10))
        levels = st.pills(
            "strengths", LEVELS, selection_mode="multi", default=USUAL, help=WHAT, format_func=_times,
            **session.held("eval_levels", USUAL, _times),
        )  # fmt: skip
        budget = st.number_input(
            "budget, KL", 0.01, 5.0, 0.3, 0.05, width=120, help="nats per token", **session.held("eval_budget", 0.3)
        )
        tokens = st.number_input("tokens", 1, 400, 40, width=110, **session.held("eval_tokens", 40))
        seeds = st.number_input("seeds", 1, 20, 1, width=90, **session.held("eval_seeds", 1))
        name = st.text_input("name", "steering", width=170, **session.held_text("eval_name", "steering"))
    with page.part():
        config = SteerEvalConfig(
            methods=tuple(methods),
            budget=float(budget),
            levels=tuple(sorted(levels)),
            instructions=int(number),
            seeds=int(seeds),
            max_new_tokens=int(tokens),
        )
        if not concepts or not methods:
            raise UserError("choose at least one concept and one method")
        return config, concepts, recipe, name
    return None, concepts, recipe, name


def _times(level: float) -> str:
    return f"×{level:g}"


def judged(count: int) -> int | None:
    """The most requests to the endpoint that may judge; None for the offline proxies."""
    asked = os.environ.get("SAELAB_APP_EXPLAIN")
    if asked is None:
        st.caption(
            "Scored by offline proxies. A language model judges where the app was started with `--explain-endpoint`."
        )
        return None
    model = json.loads(asked)["model"]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        judges = st.toggle(f"judged by {viz.markdown(model)}", **session.held("eval_judge", False))
        most = st.number_input("requests at most", 0, None, REQUESTS, width=170, **session.held("eval_most", REQUESTS))
    if judges:
        st.caption(f"About {3 * count + 144:,} requests.")
    return int(most) if judges else None


def answers(config: SteerEvalConfig, concepts: int) -> int:
    """How many answers an evaluation writes; a recipe may have fewer strengths."""
    per_method = [
        0 if name == "none" else len(PROMPTS) if name == "prompt" else len(config.levels) for name in config.methods
    ]
    return config.seeds * config.instructions * (1 + sum(per_method) * concepts)


def estimate(run: Run, config: SteerEvalConfig) -> None:
    """Measure how fast the model writes, on one small batch."""
    from saelab.cli.commands.steer_eval import fastest

    bridge = loaders.need_model(run, "An evaluation")
    model, tokenizer, some = fastest(bridge, run.hook_name), tokenizer_of(bridge), 8
    rows = [(Row("", "none", 0, 0, i, "test"), Steered()) for i in range(some)]
    with loaders.model_lock(), st.spinner("Writing eight answers …"):
        texts = shipped_instructions()
        generate_rows(model, tokenizer, rows, texts, SteerEvalConfig(max_new_tokens=1).generation, 0)
        started = time.monotonic()
        generate_rows(model, tokenizer, rows, texts, config.generation, 0)
        spent = time.monotonic() - started
    st.session_state["eval_speed"] = (run.name, spent / some / config.max_new_tokens)


def took(run: Run, config: SteerEvalConfig, count: int) -> str:
    """The time that the last estimate of this SAE's model gives."""
    name, each = st.session_state.get("eval_speed", (None, 0.0))
    if name != run.name:
        return ""
    # Reading the answers again and calibrating cost about half of what writing does.
    minutes = 1.5 * each * count * config.max_new_tokens / 60
    return f" About {minutes:.0f} minutes here." if minutes >= 1 else " Less than a minute here."


def folder_of(name: str) -> Path:
    """Where an evaluation is saved; a name that is taken by other settings is refused when it starts."""
    return loaders.workspace().root / EVALUATIONS / recipes.recipe_folder(Path(), name).name


def start(
    run: Run, folder: Path, config: SteerEvalConfig, concepts: Sequence[str], recipe: str | None, requests: int | None
) -> None:
    """Begin an evaluation, or go on with one that was stopped, in a thread that shares the model with the pages."""
    from saelab.cli.commands.steer_eval import fastest

    bridge, root = loaders.need_model(run, "An evaluation"), loaders.workspace().root
    source = loaders.opened(run)
    known = shipped_concepts()
    held = None if recipe is None else Recipe.load(root / recipes.RECIPES / recipe)
    model = fastest(bridge, source.hook_name, source.hook_name_out)
    setting = Setting(model, tokenizer_of(bridge), source, held)
    lock, judge = loaders.model_lock(), None
    if requests is not None:
        client = json.loads(os.environ["SAELAB_APP_EXPLAIN"])
        judge = ChatClient(**client, api_key=os.environ.get("OPENAI_API_KEY"), max_tokens=256)

    def work(job: Job) -> None:
        with lock.turn() as turn:

            def tell(stage: str, done: int, total: int) -> None:
                turn.pass_on()  # a page that waits for the model gets it between two batches
                job.tell(stage, done, total)

            chosen, texts = pick_concepts(list(concepts), known), shipped_instructions()
            evaluation = Evaluation(setting, chosen, known, texts, folder, config, tell)
            try:
                kept = None if judge is None else KeptAnswers(judge, folder / JUDGED, requests)
                evaluate_steering(evaluation, kept)
            except Stopped:
                save_partly(evaluation)
                raise

    st.session_state["eval_started"] = loaders.jobs().start(folder.relative_to(root).as_posix(), work).name


@st.fragment(run_every=2)
def watch(name: str) -> None:
    """How far the evaluation is, with a button that stops it."""
    job = loaders.jobs().get(name)
    if job is None or job.finished:
        st.rerun()
        return
    st.progress(min(job.done / job.total, 1.0) if job.total else 0.0, f"{viz.markdown(name)}: {job.text()}")
    if st.button("Stop", key="eval_stop", icon=":material/stop:", disabled=job.stopping):
        job.stop()
    st.caption(
        "It goes on while you read other pages. When it is stopped, what is written stays, and you can go on with it."
    )


def ended() -> None:
    """Say how the last evaluation that this session started ended."""
    job = loaders.jobs().get(st.session_state.get("eval_started", ""))
    if job is None or not job.finished:
        return
    if job.error:
        st.error(f"{viz.markdown(job.name)}: {viz.markdown(job.error)}", icon=":material/error:")
    elif job.stopped:
        st.info(f"{viz.markdown(job.name)} was stopped: {job.text()}.", icon=":material/stop_circle:")
    else:
        st.success(f"{viz.markdown(job.name)} is complete.", icon=":material/check:")


def go_on(run: Run, folder: Path, result: dict[str, Any]) -> None:
    """A button for an evaluation of this SAE that is not complete."""
    if result.get("complete") or loaders.read_only() or loaders.jobs().running() is not None:
        return
    if not st.button("Go on with it", key="eval_go_on", icon=":material/resume:"):
        return
    settings = json.loads((folder / SETTINGS).read_bytes()) if (folder / SETTINGS).is_file() else {}
    config = result.get("config") or {}
    if not settings or "recipe" in config.get("methods", []):
        raise UserError("go on with this evaluation by the command it was made with")
    fields = {name: _as_tuple(value) for name, value in config.items()}
    start(run, folder, SteerEvalConfig(**fields), settings["concepts"], None, None)
    st.rerun()


def _as_tuple(value: Any) -> Any:
    """JSON has lists where a configuration has tuples."""
    return tuple(value) if isinstance(value, list) else value
