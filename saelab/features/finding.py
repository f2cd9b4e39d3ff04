"""Find latents: one query that takes words, a latent's number, or a text, ranked by what the latents fire on.

    score = (share * count / (count + 10) * (1 + F1) / 2 + named / 2) * (matched / terms)^2

summed over the terms. ``share`` is the share of the latent's firing magnitude on words of the text that equal the
term, ``count`` are its firings, ``F1`` is the score of its offline label (0 without one), ``named`` is 1 where its
explanation has the term and F1 / n where a label of n words does, ``matched`` counts the terms that it has at all.
Latents that are mostly about the words come first, those that have all of them before those that have one, and a
handful of firings proves little. What its researcher has called a latent comes before everything else.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from saelab.errors import UserError
from saelab.features.index import FeatureIndex
from saelab.features.indexing.labels import SEPARATOR
from saelab.features.output_score import output_scores
from saelab.features.search import TEXT_COLUMNS, catalogue, find, words

FEW = 10  # firings of which nothing is known, beside those counted
NAMED = 0.5  # what a label or an explanation that has the term is worth, as a share
LONG = 6  # words from which on a query is a text
ANYTHING, WRITES = "anything", "what it writes"
Notes = Mapping[int, Mapping[str, str]]

_NUMBER = re.compile(r"#?(\d+)\s*([+\-−]?)")
_TERM = re.compile(r'"([^"]+)"|(\S+)')


class Query(NamedTuple):
    """What a text in the search box asks for."""

    kind: str
    """``all`` (an empty text), ``latent`` (a number, perhaps with the sign of a pole), ``text`` (one with ``[[marks]]``
    or more than ``LONG`` words: latents are found by running it) or ``words``."""
    terms: tuple[str, ...] = ()
    latent: int = -1
    pole: int = 0
    """0 if no pole is named."""


def read_query(text: str) -> Query:
    """What is asked: ``#12``, ``12-``, ``war``, ``world war``, ``"civil war" battle``, ``rain*``, ``The [[sea]]``."""
    text = text.strip()
    if not text:
        return Query("all")
    if number := _NUMBER.fullmatch(text):
        return Query("latent", (text,), int(number[1]), {"+": 1, "": 0}.get(number[2], -1))
    terms = tuple(a or b for a, b in _TERM.findall(text))
    if "[[" in text or len(terms) > LONG:
        return Query("text")
    return Query("words", terms)


class WordTable:
    """Which words each row of an index fires on, and the share of its magnitude on each: ``shares [rows, words]``."""

    def __init__(self, index: FeatureIndex) -> None:
        columns = index.meta["columns"]
        if "words" in columns:
            table = index.columns(["words", "word_shares"])
            lists, shares = (table[name].combine_chunks() for name in ("words", "word_shares"))
        else:  # an index of 0.1.0 knows the most frequent tokens, each firing counted alike
            table = index.columns(["top_tokens", "top_token_counts", "count"])
            lists, shares = (table[name].combine_chunks() for name in ("top_tokens", "top_token_counts"))
        sizes = np.diff(lists.offsets.to_numpy())
        rows = np.repeat(np.arange(len(sizes)), sizes)
        values = shares.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        if "words" not in columns:
            values = values / np.maximum(table["count"].to_numpy(), 1)[rows]
        known = pc.utf8_trim_whitespace(pc.utf8_lower(lists.flatten())).dictionary_encode()  # pyright: ignore
        self.words: list[str] = known.dictionary.to_pylist()
        ids = known.indices.to_numpy(zero_copy_only=False)
        self.shares: Any = sparse.csr_matrix((values, (rows, ids)), shape=(len(sizes), len(self.words)))

    def like(self, term: str) -> NDArray[np.int64]:
        """Numbers of the words that a term finds: whole, with ``*`` for any letters."""
        pattern = words(term)
        return np.array([n for n, word in enumerate(self.words) if pattern.search(word)], np.int64)

    def share(self, term: str) -> NDArray[np.float32]:
        """The share of each row's magnitude on words that the term finds."""
        return np.asarray(self.shares[:, self.like(term)].sum(1)).ravel()


class Finder:
    """Searches one index; several threads may use it. ``table`` is its :func:`catalogue`, which is never changed."""

    def __init__(self, index: FeatureIndex, table: pd.DataFrame | None = None) -> None:
        self.index = index
        self.table = catalogue(index) if table is None else table
        self.words = WordTable(index)
        listed = self.table["label"].fillna("").str.count(SEPARATOR) + 1
        self._listed = (self.table["label_score"].fillna(0.0) / listed).to_numpy()
        # Walking through a result asks the same again and again.
        self._scores = functools.lru_cache(maxsize=8)(self._score)

    def find(self, text: str, where: str = ANYTHING, notes: Notes | None = None) -> pd.DataFrame:
        """Rows of the catalogue that a query of words or a number finds, the best first, with ``share`` and ``score``.

        ``where`` is "anything" (what the latent fires on, labels, explanations, notes), or one of ``TEXT_COLUMNS``,
        which is then the only one searched. "what it writes" ranks by the share of the promoted logits that falls on
        the words instead (:func:`saelab.features.output_score.output_scores`). ``notes`` are the researcher's own, by
        latent. Raises UserError for a text (see :func:`saelab.features.by_example.find_by_example`).
        """
        query = read_query(text)
        frame: Any = self.table
        if query.kind == "text":
            raise UserError("a text is searched by running the model on it, not by its words")
        if query.kind == "all":
            order = np.argsort(-frame["telling"].to_numpy(), kind="stable")
            return frame.iloc[order].assign(share=np.nan, score=np.nan)
        if where == WRITES and query.kind == "words":
            return self._writing(query.terms)
        found: Any = self._ranked(query.terms, where, notes or {})
        if query.kind == "latent":
            own = (frame["latent"] == query.latent) & ((frame["pole"] == query.pole) | (query.pole == 0))
            found = pd.concat(
                [frame[own].assign(share=np.nan, score=np.inf), found[~found.index.isin(frame.index[own])]]
            )
        return found

    def _writing(self, terms: tuple[str, ...]) -> pd.DataFrame:
        scores = output_scores(self.index, terms)["output_score"].to_numpy()
        found: Any = self.table.assign(share=np.nan, output_score=scores, score=scores)
        return found[found["score"] > 0].sort_values("score", ascending=False, kind="stable")

    def _ranked(self, terms: tuple[str, ...], where: str, notes: Notes) -> pd.DataFrame:
        frame, (share, matched, score) = self.table, self._scores(terms, where)
        own = _noted(frame, terms, notes) if where in {ANYTHING, "label"} else np.zeros(len(frame), bool)
        hits = np.flatnonzero((matched > 0) | own)
        order = np.lexsort((-frame["telling"].to_numpy()[hits], -score[hits], ~own[hits]))
        best = hits[order]
        return frame.iloc[best].assign(share=share[best].clip(max=1.0), score=score[best])

    def _score(self, terms: tuple[str, ...], where: str) -> tuple[NDArray, NDArray, NDArray]:
        """``share``, ``matched`` and ``score`` of every row."""
        frame, n = self.table, len(self.table)
        share, matched, named = np.zeros(n), np.zeros(n), np.zeros(n)
        for term in terms:
            on = self.words.share(term)
            texts = (where,) if where in TEXT_COLUMNS else ("label", "explanation")
            hit = on > 0 if where in {ANYTHING, "fires on"} else np.zeros(n, bool)
            said = np.zeros(n)
            for name in texts:
                rows = frame.index.get_indexer(find(frame, term, name).index)
                hit[rows] = True
                said[rows] = np.maximum(said[rows], self._listed[rows] if name == "label" else 1.0)
            share, named, matched = share + on * hit, named + said, matched + hit
        count, quality = frame["count"].to_numpy(), frame["label_score"].fillna(0.0).to_numpy()
        score = (share * count / (count + FEW) * (1 + quality) / 2 + NAMED * named) * (matched / len(terms)) ** 2
        return share, matched, score

    @functools.cached_property
    def _meanings(self) -> Meanings:
        return Meanings(self.words, self.table)

    def related(self, text: str, top: int = 50) -> tuple[pd.DataFrame, list[str]]:
        """Rows whose words mean something like ``text``, which none of them need hold, and the closest words.

        ``closeness`` is the cosine of latent semantic analysis, see :class:`Meanings`. Empty for unknown words.
        """
        return self._meanings.closest(read_query(text).terms, top)


class Meanings:
    """Latent semantic analysis of an index: rows and words that keep the same company are close. Needs no model.

    A row is a document whose words are those it fires on and those of its explanation; TF is the square root of the
    share, IDF as usual, then a truncated SVD (Deerwester et al., 1990).
    """

    def __init__(self, known: WordTable, table: pd.DataFrame, width: int = 100) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.preprocessing import normalize

        self.known, self.table = known, table
        vocabulary = {word: number for number, word in enumerate(known.words)}
        said = [
            (row, vocabulary.setdefault(word, len(vocabulary)))
            for row, text in enumerate(table["explanation_lower"])
            for word in set(re.findall(r"\w{3,}", text))
        ]
        self.names = list(vocabulary)
        shape = (len(table), len(vocabulary))
        rows, ids = np.array(said, np.int64).reshape(-1, 2).T
        told = sparse.csr_matrix((np.full(len(said), 0.1, np.float32), (rows, ids)), shape=shape)
        own = known.shares.tocoo()
        counts = sparse.csr_matrix((np.sqrt(own.data), (own.row, own.col)), shape=shape) + told
        frequency = np.bincount(counts.indices, minlength=shape[1])
        self.idf = np.log((1 + shape[0]) / (1 + frequency)).astype(np.float32)
        weighed: Any = normalize(sparse.csr_matrix(counts.multiply(self.idf)))
        width = max(min(width, min(shape) - 1), 1)
        svd = TruncatedSVD(width, n_iter=3, random_state=0).fit(weighed)
        self.components = np.asarray(svd.components_, np.float32)
        self.rows: Any = normalize(weighed @ self.components.T)
        self.places: Any = normalize(self.components.T)  # of words

    def closest(self, terms: tuple[str, ...], top: int) -> tuple[pd.DataFrame, list[str]]:
        """The ``top`` rows and a few words closest to the terms together."""
        patterns = [words(term) for term in terms]
        ids = np.array([n for n, word in enumerate(self.names) if any(p.search(word) for p in patterns)], np.int64)
        place = self.components[:, ids] @ self.idf[ids]
        norm = float(np.linalg.norm(place))
        if not norm:
            return self.table.iloc[:0].assign(closeness=[]), []
        close = self.rows @ (place / norm)
        best = np.argsort(-close, kind="stable")[:top]
        best = best[close[best] > 0]
        others = np.argsort(-(self.places @ (place / norm)), kind="stable")[: len(ids) + 12]
        asked = set(ids.tolist())
        near = [self.names[n] for n in others.tolist() if n not in asked and len(self.names[n]) > 1]
        return self.table.iloc[best].assign(closeness=close[best]), near[:8]


def find_in(
    finders: Mapping[str, Finder],
    text: str,
    notes: Mapping[str, Notes] | None = None,
    top: int = 3,
    where: str = ANYTHING,
    keep: Callable[[pd.DataFrame], pd.DataFrame] = lambda rows: rows,
) -> pd.DataFrame:
    """The same query in several SAEs: the ``top`` rows of each with its name in the column ``SAE``, the best first.

    ``where`` is that of :meth:`Finder.find`; of each SAE's rows only those count that ``keep`` leaves.
    """
    parts = []
    for name, finder in finders.items():
        rows = keep(finder.find(text, where, (notes or {}).get(name))).head(top)
        parts.append(rows.assign(SAE=name))
    if not parts:
        return pd.DataFrame()
    every = pd.concat(parts, ignore_index=True)
    return every.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)


def _noted(frame: pd.DataFrame, terms: tuple[str, ...], notes: Notes) -> NDArray[np.bool_]:
    """Rows of the latents whose own label or note has all terms."""
    patterns = [words(term) for term in terms]
    texts = {latent: f"{note.get('label', '')}\n{note.get('note', '')}".lower() for latent, note in notes.items()}
    hits = [latent for latent, text in texts.items() if all(p.search(text) for p in patterns)]
    return frame["latent"].isin(hits).to_numpy()
