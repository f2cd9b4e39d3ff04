"""Figures and fragments: nothing of the corpus is live, colours can be read, every chart takes empty data."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
from small_workspace import HOSTILE

from saelab import viz
from saelab.features import Example
from saelab.features.contexts import different_documents
from saelab.viz.attribution import short_place
from saelab.viz.axes import log_axis, round_ticks, written
from saelab.viz.theme import DARK, LIGHT, contrast

BIDI_AND_CONTROL = "\u202e\u2066\u200f\u061c\u200b\ufeff\x00\x07\x1b\x85\u2028"


class Tags(HTMLParser):
    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(fragment)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_tokens_are_inert(colours: viz.Palette) -> None:
    tokens = [*HOSTILE, '" onmouseover="alert(1)', "' style='x", "&lt;b&gt;", BIDI_AND_CONTROL]
    values = np.linspace(-2, 3, len(tokens)).tolist()
    for fragment in (viz.token_strip(tokens, values, colours, focus=1), viz.token_chips(tokens, values, colours)):
        seen = Tags(fragment)
        assert set(seen.tags) <= {"div", "span"}
        assert seen.attributes <= {"class", "style", "title"}
        assert "<script>alert(1)</script>" in seen.text
        assert not set(BIDI_AND_CONTROL) & set(seen.text)


def test_the_space_before_a_word_is_not_marked() -> None:
    fragment = viz.token_strip([" river", "  ", "s"], [1.0, 2.0, 0.0], LIGHT, focus=0)
    assert Tags(fragment).text == " river  s"
    assert '> <span class="sl-pos sl-focus"' in fragment and ">river</span>" in fragment
    assert ">  </span>" in fragment, "a token of nothing but spaces is marked all the same"


def test_log_axes_name_round_numbers_once_each() -> None:
    assert round_ticks(0.854, 230) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert [written(tick) for tick in (0.00001, 0.0003, 0.02, 5, 200, 1000, 2e6)] == [
        *("10⁻⁵", "3×10⁻⁴", "0.02", "5", "200", "1k", "2M")
    ]
    edges = [0.5, 1.0, 2.0, 4.0, 8.0]
    axis = viz.activation_histogram(edges, [1, 2, 30, 0], LIGHT).layout.xaxis
    assert dict(zip(axis.ticktext, axis.tickvals)) == {"0.5": 0, "1": 1, "2": 2, "5": 3.25} | {
        text: at for text, at in zip(axis.ticktext, axis.tickvals) if text not in {"0.5", "1", "2", "5"}
    }
    assert tuple(axis.range) == (0, 4)
    zeros = viz.lines({"run": ([0, 1], [0, 0])}, LIGHT).layout.yaxis
    assert tuple(zeros.range) == (0, 1)


def test_a_heatmap_without_negative_values_uses_one_colour() -> None:
    for values, low in (([[0.0, 3.0]], 0.0), ([[-1.0, 3.0]], -3.0)):
        (drawn,) = viz.heatmap(np.array(values), ["<b>"], ["a", "b"], LIGHT).data
        assert (drawn.zmin, drawn.zmax) == (low, 3.0)
        assert (drawn.colorscale[0][1] == LIGHT.negative) == (low < 0)
        assert drawn.customdata[0][1] == "&lt;b&gt;<br>b"
    # An attention sink in front is beyond the scale, not the end of it.
    (drawn,) = viz.heatmap(np.array([[900.0, 2.0, 3.0]]), ["a"], ["<bos>", "b", "c"], LIGHT, first=1).data
    assert (drawn.zmin, drawn.zmax) == (0.0, 3.0)


def test_names_beside_a_heatmap_are_short_and_whole_where_it_is_pointed_at() -> None:
    row, column = "#12 token: a label that goes on and on", "internationalisation"
    figure = viz.heatmap(np.ones((1, 3)), [row], [" ", column, "<b>"], LIGHT)
    assert list(figure.layout.yaxis.ticktext) == ["#12 token: a label that…"]
    assert figure.layout.xaxis.labelalias == {"0": "␣", "1": "internati…", "2": "&lt;b&gt;"}
    assert list(figure.data[0].x) == ["0", "1", "2"] and figure.layout.xaxis.type == "category"
    assert figure.data[0].customdata[0][1] == f"{row}<br>{column}"


def test_a_place_beside_a_graph_is_short() -> None:
    assert short_place("blocks.9.hook_resid_post") == "9 resid_post"
    assert short_place("blocks.11.mlp.hook_post") == "11.mlp post"
    assert short_place("model.decoder.layers.11.self_attn.out_proj") == "…elf_attn.out_proj"


def test_series_of_one_colour_have_symbols_that_differ() -> None:
    points = {f"variant {i}": [(1.0 + i, 0.5, "")] for i in range(12)}
    looks_like = {"hexagon": "circle"}  # at eleven pixels
    symbols = [trace.marker.symbol for trace in viz.pareto(points, LIGHT).data]
    drawn = [(i % len(LIGHT.series), looks_like.get(s, s)) for i, s in enumerate(symbols)]
    assert len(set(drawn)) == len(points)


def test_the_line_of_several_seeds_goes_through_their_means() -> None:
    seeds = [(2.0, 0.25, "a"), (2.0, 0.27, "b"), (4.0, 0.2, "c"), (4.1, 0.16, "d"), (8.0, 0.1, "e")]
    line, marks = viz.pareto({"topk": seeds}, LIGHT).data
    assert list(line.x) == pytest.approx([2.0, 4.05, 8.0]) and list(line.y) == pytest.approx([0.26, 0.18, 0.1])
    assert line.mode == "lines" and marks.mode == "markers" and list(marks.y) == [row[1] for row in seeds]
    assert line.showlegend is False and line.legendgroup == marks.legendgroup
    (apart,) = viz.pareto({"topk": seeds[1:3]}, LIGHT).data
    assert apart.mode == "lines+markers", "one seed of each"
    (alike,) = viz.pareto({"topk": seeds[:2]}, LIGHT).data
    assert alike.mode == "markers", "there is nothing to join"


def test_bars_left_out_leave_a_gap_that_says_so() -> None:
    figure = viz.contest_bars(["#1", "#2", "#3"], [3, 2, 1], [True, True, False], LIGHT, [1, 1, 2], gap=(1, "7 more"))
    bars, marks = figure.data
    assert list(bars.y) == list(marks.y) == [0, 2, 3] and list(marks.x) == [1, 1, 2]
    assert figure.layout.annotations[0].text == "7 more" and figure.layout.annotations[0].y == 1


def test_what_belongs_to_no_group_is_muted() -> None:
    points = {"x": [0.0], "y": [1.0], "text": ["<b>"], "key": [3]}
    rest, own = viz.groups_in_plane({"none": points, "token": points}, LIGHT, ungrouped="none").data
    assert rest.marker.color == LIGHT.muted and own.marker.color is None and own.text[0] == "&lt;b&gt;"


def test_the_mark_of_a_dose_is_not_written_over_the_legend() -> None:
    figure = viz.dose_response([1, 2], {"vector": [0, 1]}, LIGHT, "shift", 1.5)
    (mark,) = figure.layout.annotations
    assert (mark.yref, mark.y, mark.yanchor) == ("paper", 1.0, "top")
    assert figure.layout.legend.y >= 1 and figure.layout.legend.yanchor == "bottom"


def test_the_order_of_examples_is_said_where_it_is_not_that_of_strength() -> None:
    def made(*documents: int) -> list[Example]:
        return [Example(0, 1, "top", i, i, document, 1.0, [], [], [], 0) for i, document in enumerate(documents)]

    assert viz.counted(made(5, 7)) == "2 contexts, of 2 documents"
    assert viz.counted(made(5, 5)) == "2 contexts, all of one document"
    said = viz.counted(different_documents(made(5, 5, 7)))
    assert said == "3 contexts, of 2 documents: the strongest of each document, then the second of each"


def test_visible_shows_what_cannot_be_seen() -> None:
    assert viz.visible("a\nb\tc") == "a⏎b⇥c"
    assert viz.visible("\u202e\x07\x7f\ud800") == "⟨U+202E⟩⟨U+0007⟩⟨U+007F⟩⟨U+D800⟩"
    assert viz.visible(" é日本 ") == " é日本 "
    assert viz.markdown("[a](b) **c** :red[d] $e$") == r"\[a\]\(b\) \*\*c\*\* \:red\[d\] \$e\$"


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_that_of_level_aa(colours: viz.Palette) -> None:
    for strength in np.linspace(-1, 1, 41):
        assert contrast(colours.text, colours.on_background(float(strength))) >= 4.5
    for ground in (colours.background, colours.surface):
        assert contrast(colours.text, ground) >= 7
        assert contrast(colours.muted, ground) >= 4.5
        assert contrast(colours.primary, ground) >= 4.5
    assert contrast(colours.on_primary, colours.primary) >= 4.5
    for line in (*colours.series, colours.positive, colours.negative):
        assert contrast(line, colours.background) >= 3, f"{line} cannot be told from the background"


def test_contrast_agrees_with_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)  # the value WebAIM's checker gives


def test_positive_and_negative_survive_colour_blindness() -> None:
    # Viénot, Brettel and Mollon (1999): without the red or the green cone the pair must still differ clearly.
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for colours in (LIGHT, DARK):
        pair = [
            np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for c in (colours.positive, colours.negative)
        ]
        for lack in (protan, deutan):
            seen = [np.linalg.inv(to_lms) @ lack @ to_lms @ rgb**2.2 for rgb in pair]
            assert np.abs(seen[0] - seen[1]).max() > 0.3


def test_charts_take_empty_and_degenerate_data() -> None:
    empty = np.array([])
    for figure in (
        viz.pareto({}, LIGHT),
        viz.lines({}, LIGHT),
        viz.density_histogram({"a": empty, "b": np.zeros(3)}, LIGHT),
        viz.activation_histogram([0, 1], [0], LIGHT, -1, {"q50": 0.5}),
        viz.logit_effects([], [], LIGHT),
        viz.firing_rank({"a": np.zeros(4)}, LIGHT, {"a": (1.0, 1.0)}),
        viz.heatmap(np.zeros((0, 0)), [], [], LIGHT),
        viz.steps([1.0], 0, LIGHT),
    ):
        figure.to_json()


def test_a_density_histogram_counts_dead_latents_at_minus_ten() -> None:
    figure = viz.density_histogram({"a": np.array([0, 0, 1e-3, 0.5])}, LIGHT)
    bar = figure.data[0]
    at = dict(zip(bar.x.round(2), bar.customdata))
    assert at[min(at)] == 2 and sum(at.values()) == 4
    assert min(at) == pytest.approx(-10)


def test_plotly_labels_are_escaped() -> None:
    figure = viz.logit_effects([("<a href='http://x'>y</a>", 1.0)], [("<b>", -1.0)], DARK)
    assert all("<" not in text for text in figure.layout.yaxis.ticktext)
    # Plotly shows entities of quotes as they are written.
    assert list(viz.logit_effects([("\"'", 1.0)], [], DARK).layout.yaxis.ticktext) == ["\"'"]


def value_of(label: str) -> float:
    """The number that a label of an axis stands for."""
    for mark, factor in {"k": 1e3, "M": 1e6, "G": 1e9}.items():
        if label.endswith(mark):
            return factor * float(label.removesuffix(mark))
    mantissa, ten, power = label.rpartition("10") if not label.isascii() else (label, "", "")
    if not ten:
        return float(label)
    raised = power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    return float(mantissa.removesuffix("×") or 1) * 10.0 ** int(raised)


@pytest.mark.parametrize("values", [[16, 32], [3e-5, 0.7], [1e-9, 1e9], [0, 2, 90], [2, 2.1], [0.0], []])
def test_a_log_axis_has_few_round_labels(values: list[float]) -> None:
    axis = log_axis(values)
    positive = [v for v in values if v > 0]
    if not positive or max(positive) < 1.5 * min(positive):
        assert axis["type"] == "linear"
        return
    assert 2 <= len(axis["tickvals"]) <= 8
    assert [value_of(text) for text in axis["ticktext"]] == pytest.approx(axis["tickvals"])
    assert min(positive) * 0.9 <= axis["tickvals"][0] and axis["tickvals"][-1] <= max(positive) * 1.1


def test_a_tool_tip_says_how_strong_for_this_latent() -> None:
    strip = viz.token_strip([" a", "b\n", "c"], [1.0, 0.0, 2.0], viz.LIGHT, below=lambda value: value / 4, breaks=True)
    assert "activation +1.000 · above 25% of its firings" in strip and "above 50% of its firings" in strip
    assert strip.count("of its firings") == 2 and strip.count("\n") == 1
    poles = viz.token_strip(["a", "b"], [1.0, -1.0], viz.LIGHT, below=lambda value: 0.2 if value > 0 else 0.7)
    assert "+1.000 · above 20%" in poles and "-1.000 · above 70%" in poles  # the pole's own firings
    assert "\n" not in viz.token_strip(["b\n"], [1.0], viz.LIGHT)


def test_curves_of_one_kind_share_a_colour_and_seeds_have_dashes() -> None:
    names = [f"sweep/{kind}_seed-{seed}" for kind in ("topk_k-8", "topk_k-16", "gated") for seed in (0, 1)]
    found = viz.looks(names, LIGHT)
    assert len(set(found.values())) == len(names)
    for a, b in zip(names[::2], names[1::2]):
        assert found[a].colour == found[b].colour and found[a].dash != found[b].dash
    assert len({found[name].colour for name in names}) == 3
    others = viz.looks([f"run {i}" for i in range(24)], LIGHT)
    assert len(set(others.values())) == 24 and len({others[f"run {i}"].dash for i in range(4)}) > 1
    legend = viz.line_legend({"<script>": others["run 0"], **found})
    assert "<script" not in legend and legend.count("sl-line") == 7
    drawn = viz.lines({name: ([1, 2], [1, 2]) for name in names}, LIGHT, legend=False)
    assert [(trace.line.color, trace.line.dash) for trace in drawn.data] == list(found.values())
    assert drawn.layout.showlegend is False
