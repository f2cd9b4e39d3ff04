"""Searching the table of latents by words."""

from __future__ import annotations

import pandas as pd
import pytest

from saelab.features.search import TEXT_COLUMNS, by_closeness, find, words


def table(*labels: str) -> pd.DataFrame:
    """One latent per label; the other columns are empty."""
    empty = {f"{column}_lower": "" for column in TEXT_COLUMNS.values()}
    return pd.DataFrame([{**empty, "label_lower": label.lower(), "telling": 0.0} for label in labels])


FOUND = [
    ("sea", "the sea at night", True),
    ("sea", "research", False),
    ("sea", "overseas", False),
    ("rain", "brain", False),
    ("rain", "rain, then snow", True),
    ("rain*", "rainy days", True),
    ("rain*", "brains", False),
    ("*rain", "brain", True),
    ("new york", "in New York now", True),
    ("Ärzte", "drei ärzte", True),
    ("arzt", "fußarzt", False),
    ("猫", "黒猫が寝る", True),  # written without spaces
    ("c++", "c++ code", True),
    (".", "a full stop.", True),
    ("3", "13 ships", False),
    ("*" * 60, "a" * 60, True),
]


@pytest.mark.parametrize(("text", "label", "found"), FOUND)
def test_whole_words(text: str, label: str, found: bool) -> None:
    assert (len(find(table(label), text)) == 1) is found
    assert (words(text).search(label.lower()) is not None) is found


def test_tokens_are_words_of_their_own() -> None:
    frame = table("x")
    frame["top_tokens_lower"] = ["\x1f".join([" sea", "re", "search", "ch"])]
    assert len(find(frame, "sea", "fires on")) == len(find(frame, "search", "fires on")) == 1
    assert len(find(frame, "ear", "fires on")) == 0


def test_the_closest_comes_first() -> None:
    frame = table("research at sea", "sea and sky", "nothing")
    assert by_closeness(find(frame, "sea"), "sea").index.tolist() == [1, 0]
