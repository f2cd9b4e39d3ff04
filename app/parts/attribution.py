"""Pieces of the Attribution page. Everything that touches the model holds its lock."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import loaders
import page
import pandas as pd
import session
import streamlit as st

from parts import recipes
from saelab import viz
from saelab.attribution import AttributionGraph, Node, attribute
from saelab.attribution.viewers import viewer_json
from saelab.runs import Run
from saelab.steering import Recipe, Scale
from saelab.workspace import recipes as saved
from saelab.workspace import steering
from saelab.workspace.relatives import other_model

OPEN = ":material/open_in_full:"
OPERATIONS = {
    "ablate": "set to zero",
    "clamp": "set to its largest activation",
    "scale": f"multiplied by {Scale.factor:g}",
}


class Explained(NamedTuple):
    """A graph, the SAEs it is of with the state of their files, and what was asked."""

    stamps: dict[str, tuple[float, ...]]
    asking: tuple[Any, ...]
    graph: AttributionGraph

    def changed(self) -> list[str]:
        """The SAEs whose files are no longer those of the graph, or are gone."""
        runs = loaders.workspace().runs
        return [name for name, stamp in self.stamps.items() if name not in runs or runs[name].stamp != stamp]


def companions(run: Run) -> dict[str, Run]:
    """Other SAEs of the folder that may stand beside this one: of the same model, at another place."""
    return {name: other for name, other in loaders.workspace().runs.items() if not not_beside(run, other)}


def not_beside(run: Run, other: Run) -> str:
    """Why an SAE cannot stand beside this one; empty where it can."""
    place = other.metadata.get("hook_name")
    if not other.has_weights:
        return "it has no weights yet"
    if place is None:
        return "its files do not record its hook point"
    if place == run.metadata.get("hook_name"):
        return f"it reads {place}, as {run.name} does, and one SAE stands at each place"
    return f"it is of another model, {other.model_name}" if other_model(run, other) else ""


def explain(runs: list[Run], prompt: str, target: str, against: str, settings: dict[str, Any]) -> AttributionGraph:
    """The graph of one prediction; needs the model."""
    model: Any = None
    for run in runs:  # each run's weights are compared with the model's
        model = loaders.need_model(run, "Attribution")
    with loaders.model_lock(), st.spinner("Tracing the prediction …"):
        return attribute(
            [loaders.opened(run) for run in runs],
            prompt,
            target or None,
            against=against or None,
            model=model,
            any_weights=True,  # need_model has compared them
            **settings,
        )


def headline(graph: AttributionGraph) -> None:
    """What is explained, how, and what the user should know."""
    alone = graph.target == f"logit of {graph.target_text!r}"  # not the difference of two
    mean = " above the mean of all logits" if alone else ""
    token = viz.markdown(graph.target_text)
    st.markdown(
        f"**{viz.markdown(graph.target)}**: {graph.value:+.3f}{mean}; probability of ‘{token}’ {graph.probability:.1%}"
    )
    model = "with attention patterns and norms frozen" if graph.mode == "frozen" else "in the model as it is"
    how = f"integrated gradients in {graph.integrated} steps" if graph.integrated else "activation × gradient"
    st.caption(f"Effects: {how}, {model}.")
    for note in graph.notes:
        st.caption(f":material/info: {viz.markdown(note)}")


def figure(graph: AttributionGraph, current: bool) -> Node | None:
    """The interactive figure; the node that was clicked. Examples are those of an index of now."""
    drawn = viz.attribution_graph(graph, page.colours(), _examples(graph) if current else {})
    event = page.chart(
        drawn,
        alt="Latents, error terms and tokens by layer and position, joined by their strongest effects",
        key="attribution_figure",
        on_select="rerun",
        selection_mode="points",
    )
    points = event.selection.points if event is not None else []
    names = {node.id for node in graph.nodes}
    for point in points:
        name = point.get("customdata")
        name = name[0] if isinstance(name, list) and name else name
        if name in names:
            return graph[name]
    return None


def _examples(graph: AttributionGraph, most: int = 2) -> dict[str, list[str]]:
    """The strongest examples of each kept latent, where there is an index."""
    found: dict[str, list[str]] = {}
    for node in graph.latents[:60]:
        index = graph.run_of(node).index
        if index is None or node.latent is None:
            continue
        pole = node.pole if node.pole in index.poles else 1
        found[node.id] = [_around(example) for example in index.examples(node.latent, pole)[:most]]
    return found


def _around(example: Any, before: int = 6, after: int = 3) -> str:
    """The tokens around an example's strongest activation."""
    peak = max(range(len(example.activations)), key=lambda i: abs(example.activations[i]))
    part = example.strings[max(0, peak - before) : peak + after + 1]
    return "… " + "".join(part).strip() + " …"


def details(graph: AttributionGraph, node: Node | None, current: bool) -> None:
    """What feeds the clicked node, what it feeds, and a button to its page."""
    if node is None:
        st.caption(
            "Orange raises the explained number, blue lowers it; the larger the mark, the larger its effect. Point at "
            "a mark for what is known of it; click one to see what feeds it and what it feeds."
        )
        return
    st.markdown(f"**{viz.markdown(viz.node_name(graph, node))}** {viz.markdown(node.label)}")
    columns = st.columns(2, gap="large")
    for column, title, edges, end in (
        (columns[0], "fed by", graph.into(node.id), "source"),
        (columns[1], "feeds", graph.out_of(node.id), "target"),
    ):
        ends = [(edge, graph[getattr(edge, end)]) for edge in edges[:8]]
        rows = [(viz.node_name(graph, other), f"{edge.effect:+.4f}", other.label) for edge, other in ends]
        with column:
            st.markdown(f"**{title}**")
            page.html(viz.fact_table(rows) if rows else viz.caption("nothing that was kept"))
    named = f"Open latent #{node.latent}"
    if current and node.latent is not None and st.button(named, icon=OPEN, key="attribution_open"):
        session.open_latent(node.latent, node.pole, _named(graph, node))


def _named(graph: AttributionGraph, node: Node) -> Run | None:
    """The run of the folder that a node's place belongs to."""
    names = st.session_state["attribution"].stamps
    path = graph.place(node).run
    return next((r for name, r in loaders.workspace().runs.items() if name in names and str(r.path) == path), None)


def table(graph: AttributionGraph) -> list[Node]:
    """The kept latents; the chosen ones, by default the three that raise the target most."""
    checked = {found.id: found.ablated for found in (graph.checks.nodes if graph.checks else [])}
    rows = pd.DataFrame(
        {
            "latent": [f"#{n.latent}" for n in graph.latents],
            "place": [viz.visible(graph.place(n).name) for n in graph.latents],
            "token": [viz.visible(graph.tokens[n.position]) for n in graph.latents],
            "position": [n.position for n in graph.latents],
            "effect": [n.effect for n in graph.latents],
            "direct": [n.direct for n in graph.latents],
            "ablated": [checked.get(n.id) for n in graph.latents],
            "activation": [n.activation for n in graph.latents],
            "what": [viz.visible(n.label) for n in graph.latents],
        }
    )
    if rows.empty:
        st.caption("No latent was kept.")
        return []
    if len(graph.places) == 1:
        rows = rows.drop(columns="place")
    number = {name: st.column_config.NumberColumn(name, format="%+.3f") for name in ("effect", "direct", "ablated")}
    number["activation"] = st.column_config.NumberColumn("activation", format="%+.2f", help="raw units")
    event = st.dataframe(
        rows,
        hide_index=True,
        height=360,
        column_config=number,
        on_select="rerun",
        selection_mode="multi-row",
        key="attribution_table",
        placeholder="–",
        alt="Latents by their effect on the prediction",
    )
    chosen = [i for i in event.selection.rows if i < len(graph.latents)]
    return [graph.latents[i] for i in chosen] or graph.causes[:3] or graph.latents[:3]


def checks(graph: AttributionGraph) -> str:
    """How much of the influence latents have, and what ablation says."""
    rows = []
    for place in graph.places:
        rows.append((place.name, f"{place.share:.0%}", "of the influence is the latents', the rest the error terms'"))
        rows.append(("", f"{place.kept_share:.0%}", f"of it kept, with {place.kept} nodes"))
    if graph.checks is not None and graph.checks.nodes:
        n = len(graph.checks.nodes)
        rows.append((f"the {n} strongest ablated", f"{graph.checks.same_sign}", "have the sign that attribution gives"))
        rows.append(("", f"{graph.checks.within(2.0)}", "its size too, up to a factor of 2"))
    if (found := graph.faithfulness) is not None:
        rows.append(
            ("faithfulness", f"{found.faithfulness:.2f}", "(kept − none) / (all − none): 1 is all that latents do")
        )
        left = "1 − (left out − none) / (all − none): 1 where what was left out does nothing on its own"
        rows.append(("completeness", f"{found.completeness:.2f}", left))
        rows.append(("with all latents", f"{found.whole:+.2f}", "the explained number; error terms stay in all four"))
        rows.append(("with those kept", f"{found.kept:+.2f}", "all others set to zero, on every token but the first"))
        rows.append(("with those left out", f"{found.others:+.2f}", "those kept set to zero"))
        rows.append(("with none", f"{found.none:+.2f}", "all set to zero"))
    for name, value in graph.sums.items():
        rows.append((name, f"{value:+.3f}", "direct effect"))
    return viz.fact_table(rows)


def intervene(run: Run, graph: AttributionGraph, chosen: list[Node]) -> None:
    """Change the chosen latents and see the text; hand them to the Steering page; save a recipe or the graph."""
    if not chosen:
        return
    names = viz.markdown(", ".join(viz.node_name(graph, node) for node in chosen))
    st.caption(
        f"Chosen: {names}. Choose others in the table. They are changed on every token but the first, those of the "
        "continuation too; the column *ablated* is of one token."
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        operation = st.selectbox(
            "do",
            list(OPERATIONS),
            format_func=_described,
            width=260,
            **session.held("attribution_operation", "ablate", _described),
        )
        asked = st.button("Continue the prompt", icon=":material/play_arrow:", key="attribution_continue")
        sent = st.button("Open in Steering", icon=":material/tune:", key="attribution_steer")
        st.download_button(
            "Graph as JSON",
            json.dumps(viewer_json(graph, "graph")),
            "graph.json",
            "application/json",
            icon=":material/download:",
            help="circuit-tracer's and Neuronpedia's viewers read it",
        )
    if sent:
        _send(graph, chosen, operation)
    now = f"{operation} {', '.join(dict.fromkeys(viz.latent_name(graph, node) for node in chosen))}"
    if asked:
        st.session_state["attribution_text"] = (graph, now, _continue(run, graph, chosen, operation))
    of, made_with, texts = st.session_state.get("attribution_text", (None, "", {}))
    if of is graph:
        _show(texts, made_with, made_with != now)
    _save(run, graph, chosen, operation)


def _described(operation: str) -> str:
    return f"{operation}: {OPERATIONS[operation]}"


def _send(graph: AttributionGraph, chosen: list[Node], operation: str) -> None:
    """Go to the Steering page with the chosen latents; it changes one SAE at a time, that of the first of them."""
    run = _named(graph, chosen[0])
    if run is not None:
        own = {(n.latent, n.pole): None for n in chosen if n.latent is not None and n.layer == chosen[0].layer}
        session.steer_all(run, [(int(latent), pole) for latent, pole in own], operation)


def _continue(run: Run, graph: AttributionGraph, chosen: list[Node], operation: str) -> dict[str, Any]:
    model = loaders.need_model(run, "Attribution")
    interventions = graph.interventions(chosen, operation)
    with loaders.model_lock(), st.spinner("Generating …"):
        return {
            "as it is": steering.continue_text(model, graph.prompt, [], max_new_tokens=20),
            "changed": steering.continue_text(model, graph.prompt, interventions, max_new_tokens=20),
        }


def _show(texts: dict[str, Any], made_with: str, outdated: bool) -> None:
    st.caption(f"Changed: {viz.markdown(made_with)} on every token but the first")
    if outdated:
        st.warning("The choice has changed since. Continue again to see what it does.", icon=session.OUTDATED)
    before = texts["as it is"].tokens
    for column, (name, text) in zip(st.columns(len(texts)), texts.items()):
        with column, st.container(border=True, height="stretch"):
            st.markdown(f"**{name}**")
            marks = steering.changed(before, text.tokens) if name != "as it is" else [False] * len(text.tokens)
            strip = viz.token_strip(text.strings, [0.55 * m for m in marks], page.colours(), 1.0, unit="changed")
            page.html(viz.outdated(strip) if outdated else strip)


def _save(run: Run, graph: AttributionGraph, chosen: list[Node], operation: str) -> None:
    name = recipes.asked_name("attribution_save", "Save the change as a recipe", "attribution_recipe")
    if name is None:
        return
    folder = saved.recipe_folder(loaders.workspace().root, name)
    model = loaders.need_model(run, "Attribution")
    with loaders.model_lock(), st.spinner("Saving …"):
        about = {"attribution": {"target": graph.target, "value": graph.value, "nodes": [n.id for n in chosen]}}
        recipe = Recipe.of(model, graph.interventions(chosen, operation), name=name.strip(), provenance=about)
        recipe.save(folder)
    st.toast(f"Saved {folder.name}", icon=":material/check:")
