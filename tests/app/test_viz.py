"""Figures and fragments: nothing of the corpus is live, colours can be read, every chart takes empty data."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
from small_workspace import HOSTILE

from saelab import viz
from saelab.viz.axes import log_axis
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


@pytest.mark.parametrize("values", [[16, 32], [3e-5, 0.7], [1e-9, 1e9], [0, 2, 90], [2, 2.1], [0.0], []])
def test_a_log_axis_has_few_round_labels(values: list[float]) -> None:
    axis = log_axis(values)
    positive = [v for v in values if v > 0]
    if not positive or max(positive) < 1.5 * min(positive):
        assert axis["type"] == "linear"
        return
    assert 2 <= len(axis["tickvals"]) <= 8
    assert [float(text) for text in axis["ticktext"]] == pytest.approx(axis["tickvals"])
    assert min(positive) * 0.9 <= axis["tickvals"][0] and axis["tickvals"][-1] <= max(positive) * 1.1
