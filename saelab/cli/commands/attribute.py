"""``saelab attribute``: which latents caused a token, and which fed which."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table
from rich.text import Text

from saelab.attribution import AttributeConfig, AttributionGraph, Node, attribute, write_graph
from saelab.cli.console import console, out, parse, part, print_json
from saelab.cli.models import ModelOptions, open_model
from saelab.cli.opening import open_run, print_notes
from saelab.cli.placement import computing_device, follows, join
from saelab.errors import UserError
from saelab.runs.language_model import model_record
from saelab.steering import OPERATIONS, Recipe, compare
from saelab.steering.recipe import check_free


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """Which SAEs, which prediction, and what to write."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders of SAEs or transcoders, one for each place (a hub id or another tool's file each)."""
    prompt: str
    """Text whose next token is explained."""
    target: str | None = None
    """The token to explain, such as ' Paris'; of a longer text its first token. By default the likeliest one."""
    against: str | None = None
    """Another token, such as ' Rome': the difference of the two logits is explained."""
    nodes: int = 15
    """Rows of the table."""
    out: Path | None = None
    """Write the graph into this .json file, which circuit-tracer's and Neuronpedia's viewers read."""
    features: bool = False
    """With --out, also write what the indexes know of each latent, for circuit-tracer's viewer (folder features)."""
    figure: Path | None = None
    """Write the graph as a page (.html) that needs no server."""
    steer: tuple[str, ...] = ()
    """Latents of the graph to steer with (9_123_4), or a number: so many of those that raise the target most."""
    operation: str = "ablate"
    """What to do with them: ablate, clamp, scale, add."""
    amount: str | None = None
    """The operation's number, as in `saelab steer --strength`."""
    recipe: Path | None = None
    """Write that steering as a recipe into this folder."""
    max_new_tokens: int = 20
    """Tokens to continue the prompt by, with and without the steering."""
    json: bool = False
    """Print the graph as JSON on stdout."""


@dataclasses.dataclass(frozen=True)
class _Options(ModelOptions, OwnOptions):
    """Everything but how to explain."""


# The settings come after ours in the list of fields, so they are the first base.
AttributeOptions = dataclasses.make_dataclass("AttributeOptions", [], bases=(AttributeConfig, _Options), frozen=True)


def main(args: Sequence[str]) -> None:
    """Explain, show, write."""
    options: Any = parse(AttributeOptions, "attribute", args, "Find out which latents caused a token.")
    config = part(AttributeConfig, options)
    _check(options)
    device = computing_device(options.device)
    join(options.tensor_parallel, device)
    if follows():
        options = dataclasses.replace(options, out=None, figure=None, recipe=None)
    runs = [open_run(name) for name in options.runs]
    for run in runs:
        run.sae.to(device)
    model = open_model(options, model_record(runs[0]), f"the SAE {options.runs[0]}")
    graph = attribute(
        runs,
        options.prompt,
        options.target,
        against=options.against,
        model=model,
        config=config,
        any_weights=options.any_weights,
    )
    if options.json:
        from saelab.attribution.viewers import viewer_json

        print_json(viewer_json(graph, options.out.stem if options.out else "graph"))
    else:
        show(graph, options.nodes)
    print_notes(graph.notes)
    if options.out is not None:
        write_graph(graph, options.out, features=options.features)
        console.print(f"wrote {options.out}", markup=False, soft_wrap=True)
    if options.figure is not None:
        _write_figure(graph, options.figure)
    if options.steer:
        _steer(graph, model, options)


def _check(options: Any) -> None:
    if not options.runs:
        raise UserError("name at least one run folder")
    if options.out is not None and options.out.suffix != ".json":
        raise UserError(f"--out {options.out} does not end in .json; name a file such as graph.json")
    if options.figure is not None and options.figure.suffix != ".html":
        raise UserError(f"--figure {options.figure} does not end in .html; name a file such as graph.html")
    if options.operation not in OPERATIONS:
        raise UserError(f"unknown operation {options.operation!r}; known: {', '.join(OPERATIONS)}")
    if options.recipe is not None:
        if not options.steer:
            raise UserError("--recipe needs the latents to steer with: --steer 3 takes the three strongest causes")
        check_free(options.recipe)


def show(graph: AttributionGraph, rows: int) -> None:
    """The prediction, the strongest nodes, how much each place explains, and what ablation says."""
    how = f"{graph.mode}, integrated gradients" if graph.integrated else f"{graph.mode}, activation x gradient"
    out.print(f"{graph.target}: {graph.value:+.3f}, probability {graph.probability:.3f} ({how})", markup=False)
    table = Table("node", "token", "activation", "effect", "direct", "ablated", "what")
    checked = {found.id: found.ablated for found in (graph.checks.nodes if graph.checks else [])}
    for node in graph.nodes[: min(rows, len(graph.nodes) - 1)]:
        table.add_row(*map(Text, _row(graph, node, checked)))
    out.print(table)
    for place in graph.places:
        out.print(
            f"{place.name}: {place.kept} of {place.latents} latents and {len(graph.tokens)} error terms kept, "
            f"{place.kept_share:.0%} of the influence; latents have {place.share:.0%} of it, error terms the rest",
            markup=False,
            soft_wrap=True,
        )
    if graph.sums:
        parts = ", ".join(f"{name} {value:+.3f}" for name, value in graph.sums.items())
        out.print(f"direct effects: {parts}", markup=False, soft_wrap=True)
    _show_checks(graph)


def _row(graph: AttributionGraph, node: Node, checked: dict[str, float]) -> list[str]:
    activation = "" if node.activation is None else f"{node.activation:+.2f}"
    ablated = f"{checked[node.id]:+.3f}" if node.id in checked else ""
    token = repr(graph.tokens[node.position])
    return [node.id, token, activation, f"{node.effect:+.3f}", f"{node.direct:+.3f}", ablated, node.label or node.kind]


def _show_checks(graph: AttributionGraph) -> None:
    if graph.checks is not None and graph.checks.nodes:
        n, signs = len(graph.checks.nodes), graph.checks.same_sign
        out.print(
            f"ablation of the {n} strongest latents: {signs} have the sign that attribution gives, "
            f"{graph.checks.within(2.0)} its size up to a factor of 2",
            markup=False,
            soft_wrap=True,
        )
    if (found := graph.faithfulness) is not None:
        out.print(
            f"the kept latents alone give {found.kept:+.3f}, none {found.none:+.3f}, all {found.whole:+.3f}: "
            f"faithfulness {found.faithfulness:.2f}, completeness {found.completeness:.2f} (error terms stay; with "
            f"those of the graph alone {found.strict_faithfulness:.2f})",
            markup=False,
            soft_wrap=True,
        )


def _write_figure(graph: AttributionGraph, path: Path) -> None:
    from saelab.viz import LIGHT, attribution_graph
    from saelab.viz.export import figure_page

    path.write_text(figure_page(attribution_graph(graph, LIGHT), graph.target), encoding="utf-8")
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


def _steer(graph: AttributionGraph, model: Any, options: Any) -> None:
    wanted = options.steer
    if len(wanted) == 1 and wanted[0].isdigit():
        wanted = [node.id for node in graph.causes[: int(wanted[0])]]
    interventions = graph.interventions(wanted, options.operation, options.amount)
    for text in compare(model, options.prompt, interventions, max_new_tokens=options.max_new_tokens):
        out.print(Text("unsteered "), Text(repr(text.unsteered)))
        out.print(Text("steered   "), Text(repr(text.steered)))
    if options.recipe is not None:
        about = {"target": graph.target, "value": graph.value, "nodes": list(wanted)}
        recipe = Recipe.of(model, interventions, name=graph.target, provenance={"attribution": about})
        recipe.save(options.recipe)
        console.print(f"wrote {options.recipe}", markup=False, soft_wrap=True)
