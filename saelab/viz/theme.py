"""Colours: two palettes, both colour-blind safe, with the contrast that WCAG's level AA asks for (a test checks)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """Hex colours of one theme.

    Positive is orange and negative blue: the pair survives every common colour blindness.
    """

    background: str
    surface: str
    text: str
    muted: str
    grid: str
    primary: str
    on_primary: str
    """Text on ``primary``."""
    positive: str
    negative: str
    max_alpha: float
    """Opacity of the strongest token highlight: as strong as text on it stays readable."""
    series: tuple[str, ...]
    """Line colours, in order of use; at least 3:1 against the background."""

    def tint(self, strength: float) -> str:
        """CSS colour of a token whose activation is ``strength`` in -1..1 of the scale's end."""
        base = self.positive if strength >= 0 else self.negative
        red, green, blue = _rgb(base)
        return f"rgba({red},{green},{blue},{self.alpha(strength):.2f})"

    def alpha(self, strength: float) -> float:
        """Opacity of a highlight: faint activations still show, zero does not."""
        size = min(1.0, abs(strength))
        return 0.0 if size == 0 else 0.10 + (self.max_alpha - 0.10) * size

    def on_background(self, strength: float) -> str:
        """The opaque colour a highlight of ``strength`` gives on the page's background."""
        base = self.positive if strength >= 0 else self.negative
        return mix(base, self.background, self.alpha(strength))


LIGHT = Palette(
    background="#ffffff",
    surface="#f5f6f8",
    text="#1c2024",
    muted="#5b636e",
    grid="#e4e7eb",
    primary="#0b6e8a",
    on_primary="#ffffff",
    positive="#e8710a",
    negative="#1f6fd0",
    max_alpha=0.62,
    series=("#0072b2", "#c4500b", "#007a5a", "#a1408a", "#7d6200", "#4a58c9", "#b3263a", "#4d5966"),
)
DARK = Palette(
    background="#0f1216",
    surface="#181c22",
    text="#e8eaed",
    muted="#a3abb6",
    grid="#2a3038",
    primary="#4fb6d6",
    on_primary="#0f1216",
    positive="#f28a2e",
    negative="#4c94f0",
    max_alpha=0.52,
    series=("#5ab4ec", "#f2984f", "#3cc79c", "#e08cc4", "#dcc24a", "#97a4ff", "#f27d8a", "#aab4c0"),
)
# Colours repeat after eight series: a symbol must not resemble the one eight places before it.
SYMBOLS = (
    "circle",
    "diamond",
    "square",
    "triangle-up",
    "cross",
    "star",
    "pentagon",
    "x",
    "bowtie",
    "triangle-down",
    "hexagon",
)


def palette(dark: bool = False) -> Palette:
    """The palette of a theme."""
    return DARK if dark else LIGHT


def mix(top: str, bottom: str, alpha: float) -> str:
    """The opaque colour of ``top`` at opacity ``alpha`` over ``bottom``; both hex."""
    pairs = zip(_rgb(top), _rgb(bottom), strict=True)
    return "#" + "".join(f"{round(alpha * a + (1 - alpha) * b):02x}" for a, b in pairs)


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two hex colours, 1 to 21."""
    lighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _rgb(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
