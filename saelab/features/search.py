"""The table of all latents: search by text, filters, and the marks of a search by example."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import UserError
from saelab.features.explanations import imported_labels, load
from saelab.features.index import FeatureIndex
from saelab.metrics.density import DENSE, ULTRA_DENSE
from saelab.sae import SAE
from saelab.sae.base import unit_rows

DYING_FIRINGS = 5
STATES = {
    "dead": "fired on no token of the index",
    "dying": f"fired on fewer than {DYING_FIRINGS} tokens",
    "dense": f"fires on more than {DENSE:.0%} of tokens",
    "ultra-dense": f"fires on more than {ULTRA_DENSE:.0%} of tokens",
}
TEXT_COLUMNS = {
    "label": "label",
    "explanation": "explanation",
    "fires on": "top_tokens",
    "promotes": "promoted",
    "suppresses": "suppressed",
}
_SPAN = re.compile(r"\[\[(.+?)\]\]", re.DOTALL)


def find(table: pd.DataFrame, text: str, where: str = "anything") -> pd.DataFrame:
    """Rows whose text columns contain the word or words ``text``, ignoring case; all rows for an empty text.

    Words are whole: "sea" does not find "research". A ``*`` stands for any letters ("rain*" finds "rainy").
    ``where`` is one of ``TEXT_COLUMNS`` or "anything". The columns hold one string per latent, see :func:`catalogue`.
    """
    text = text.strip().lower()
    frame: Any = table
    if not text:
        return frame
    columns = [TEXT_COLUMNS[where]] if where in TEXT_COLUMNS else list(TEXT_COLUMNS.values())
    hit = pd.Series(False, index=table.index)
    pattern = words(text)
    for column in columns:
        hit |= table[f"{column}_lower"].str.contains(pattern)
    return frame[hit]


def words(text: str) -> re.Pattern[str]:
    """The pattern that finds ``text`` as whole words, ``*`` standing for any letters.

    An end of the text that is no letter with an upper and a lower case and no digit has no border: scripts such as
    Chinese are written without spaces, and a space or a full stop borders on anything.
    """
    text = text.strip().lower()
    inner = "".join(r"\w*" if part[:1] == "*" else re.escape(part) for part in re.split(r"(\*+)", text))
    before, after = (r"(?<!\w)" if _is_letter(text[:1]) else "", r"(?!\w)" if _is_letter(text[-1:]) else "")
    return re.compile(f"{before}{inner}{after}")


def _is_letter(character: str) -> bool:
    return character.lower() != character.upper() or character.isdigit()


def by_closeness(table: pd.DataFrame, text: str) -> pd.DataFrame:
    """Rows found by ``text``, ordered by how early it stands in the label or the tokens, then by ``telling``."""
    pattern, frame = words(text), table
    nearest = np.min(
        [_first(frame[f"{name}_lower"], pattern) for name in ("label", "explanation", "top_tokens")], axis=0
    )
    order = np.lexsort((-frame["telling"].to_numpy(), nearest))
    return frame.iloc[order]


def _first(column: Any, pattern: re.Pattern[str]) -> list[int]:
    """Where the pattern first stands in each text; a large number where it does not."""
    found = (pattern.search(text) for text in column)
    return [1 << 20 if match is None else match.start() for match in found]


def narrow(
    table: pd.DataFrame,
    pole: int | None = None,
    state: str | None = None,
    density: tuple[float, float] | None = None,
    entropy: tuple[float, float] | None = None,
    role: str | None = None,
) -> pd.DataFrame:
    """Rows of one pole, in one of ``STATES``, within ranges of density and of token entropy in bits (both ends in), and
    of those that fire most strongly on messages of ``role``."""
    keep = pd.Series(True, index=table.index)
    if pole is not None:
        keep &= table["pole"] == pole
    if state == "dead":
        keep &= table["count"] == 0
    elif state == "dying":
        keep &= table["count"].between(1, DYING_FIRINGS - 1)
    elif state == "dense":
        keep &= table["density"] > DENSE
    elif state == "ultra-dense":
        keep &= table["density"] > ULTRA_DENSE
    if density is not None:
        keep &= table["density"].between(*density)
    if entropy is not None:
        keep &= table["token_entropy"].between(*entropy)
    if role is not None:
        keep &= table["role"] == role
    frame: Any = table
    return frame[keep]


def marked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its ``[[...]]`` marks, and the marked character ranges; without marks, all of it."""
    plain, spans, position = "", [], 0
    for match in _SPAN.finditer(text):
        plain += text[position : match.start()]
        spans.append((len(plain), len(plain) + len(match[1])))
        plain += match[1]
        position = match.end()
    plain += text[position:]
    if not plain.strip():
        raise UserError("the example is empty; paste a text and mark what you mean with [[ ]]")
    return plain, spans or [(0, len(plain))]


def tokens_in(strings: list[str], spans: list[tuple[int, int]], offset: int = 0) -> list[bool]:
    """Which tokens overlap the character ranges; the first ``offset`` tokens (BOS) are no part of the text.

    White space at a token's start does not count as overlap: " mill" is not in a range that ends before it.
    """
    inside, position = [False] * min(offset, len(strings)), 0
    for string in strings[offset:]:
        start = position + len(string) - len(string.lstrip()) if string.strip() else position
        position += len(string)
        inside.append(any(start < stop and position > first for first, stop in spans))
    for number in reversed(range(min(offset, len(strings)), len(strings) - 1)):
        if not strings[number]:  # part of the character that a later token completes
            inside[number] = inside[number + 1]
    return inside


def per_latent(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column of counts or densities summed over the poles, in the order of the latents."""
    frame: Any = table
    return frame.groupby("latent")[column].sum().to_numpy(copy=True)  # pandas hands out read-only views


def count_states(table: pd.DataFrame) -> dict[str, int]:
    """How many latents are in each of ``STATES``, both poles taken together; dense includes ultra-dense."""
    count, density = per_latent(table, "count"), per_latent(table, "density")
    return {
        "dead": int((count == 0).sum()),
        "dying": int(((count > 0) & (count < DYING_FIRINGS)).sum()),
        "dense": int((density > DENSE).sum()),
        "ultra-dense": int((density > ULTRA_DENSE).sum()),
    }


@torch.no_grad()
def counterparts(
    direction: Float[Tensor, " d_in"], others: Mapping[str, SAE], signed: bool = False
) -> dict[str, tuple[int, float]]:
    """In each other SAE the latent closest to ``direction``, and its cosine.

    It says that a direction is found again only where the SAEs began with different weights (see
    :func:`saelab.workspace.relatives.same_start`), and beside the cosine of a random direction.
    """
    unit = unit_rows(direction.detach().float()[None])[0]
    found = {}
    for name, sae in others.items():
        rows = sae.directions.detach().float()
        # No copy of the dictionary is made: this runs whenever a latent's page is drawn.
        cosines = rows @ unit / rows.norm(dim=1).clamp_min(1e-30)
        best = int((cosines.abs() if signed or sae.signed else cosines).argmax())
        found[name] = (best, float(cosines[best]))
    return found


def catalogue(index: FeatureIndex) -> pd.DataFrame:
    """The index's table with its token lists: one searchable string per text column, and one to show.

    ``top_tokens``, ``promoted`` and ``suppressed`` are joined by spaces, each token in quotes so that its own spaces
    show; ``role`` is that of most top examples in a corpus of chats, else empty; ``label_lower``, ``top_tokens_lower``,
    ... are what :func:`find` searches. ``telling`` is the label's score times the bits of a firing (-log2 density),
    ``explanation`` what ``saelab explain`` saved, or an imported label.
    """
    table = index.table()
    names = [name for name in TEXT_COLUMNS.values() if name not in {"label", "explanation"}]
    lists = index.columns(names)
    table["label_lower"] = table["label"].fillna("").str.lower()
    texts = {(latent, 1): label.text for latent, label in imported_labels(index.run_folder).items()}
    texts |= {key: row.get("text", "") for key, row in load(index.run_folder).items()}
    keys = zip(table["latent"], table["pole"]) if texts else ()
    table["explanation"] = [texts.get(key, "") for key in keys] or ""
    table["explanation_lower"] = table["explanation"].str.lower()
    # A label that predicts a rare latent says more than one that predicts "the".
    rarity = -np.log2(table["density"].clip(lower=1 / max(index.meta["tokens"], 1)))
    table = table.merge(index.roles, on=["latent", "pole"], how="left")
    table["role"] = [role if isinstance(role, str) else "" for role in table["role"]]
    table["telling"] = table["label_score"].fillna(0.0) * rarity
    for name in names:
        # An ASCII separator that no search contains keeps tokens apart.
        joined = pc.binary_join(lists[name].combine_chunks(), "\x1f").to_pandas().fillna("")  # pyright: ignore
        table[f"{name}_lower"] = joined.str.lower()
        table[name] = ("‘" + joined.str.replace("\x1f", "’ ‘", regex=False) + "’").where(joined != "", "")
    return table
