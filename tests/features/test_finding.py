"""Search: what a query means, what it finds and in which order, against counts of the planted firings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saelab.cli import main
from saelab.data.cache import ActivationCache
from saelab.errors import UserError
from saelab.features import FeatureIndex, IndexConfig, build_index
from saelab.features.explanations import Explanation, JudgeScore
from saelab.features.explanations.interpretation import save
from saelab.features.finding import Finder, Query, find_in, read_query
from saelab.shipped import checkpoints
from tests.features.lookup import Lookup

NAMES = [" sea", " re", "search", " war", " world", " rain", " b", "rain", " music", " song", " melody", ",", " boat"]
CONTEXT, N = 16, 200 * 16


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("", Query("all")),
        ("#12", Query("latent", ("#12",), 12)),
        (" 12 − ", Query("latent", ("12 −",), 12, -1)),
        ("12+", Query("latent", ("12+",), 12, 1)),
        ("world war", Query("words", ("world", "war"))),
        ('"world war" peace', Query("words", ("world war", "peace"))),
        ("the [[sea]]", Query("text")),
        ("one two three four five six seven", Query("text")),
        ("12 monkeys", Query("words", ("12", "monkeys"))),
    ],
)
def test_a_query_says_what_it_is(text: str, query: Query) -> None:
    assert read_query(text) == query


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureIndex, torch.Tensor, list[str]]:
    """Latent 0 is mostly about the sea, 1 about research with a little sea, 2 about war, 3 about world and war, 4 fires
    twice, on the sea; 5 to 7 on groups of words that keep company."""
    folder = tmp_path_factory.mktemp("finding")
    torch.manual_seed(0)
    tokens = torch.randint(0, len(NAMES), (N,))
    tokens[(tokens == 2) | (tokens == 7)] = 11
    tokens[1:][tokens[:-1] == 1] = 2  # "re" is followed by "search", and nothing else is
    tokens[1:][tokens[:-1] == 6] = 7
    tokens[1:][(tokens[1:] == 2) & (tokens[:-1] != 1)] = 11
    is_ = {name.strip(): (tokens == number).float() for number, name in enumerate(NAMES)}
    code = torch.zeros(N, 9)
    code[:, 0] = 3 * is_["sea"] + is_["boat"]
    code[:, 1] = is_["search"] + 0.05 * is_["sea"] * (torch.rand(N) < 0.3)
    code[:, 2] = is_["war"]
    code[:, 3] = is_["war"] + is_["world"]
    code[(tokens == 0).nonzero()[:2, 0], 4] = 1.0
    for latent, word in ((5, "song"), (6, "melody")):
        code[:, latent] = is_["music"] * 0.5 + is_[word]
    code[:, 7] = is_[","]
    acts = torch.zeros(N, 4)
    acts[:, 0] = torch.arange(N)
    cache = ActivationCache.from_tensors(folder / "cache", acts, tokens, context_length=CONTEXT)
    index = build_index(Lookup(code), cache, folder / "run", token_strings=NAMES, config=IndexConfig())
    words: list[str] = []
    for line in tokens.view(-1, CONTEXT).tolist():
        texts = [NAMES[token] for token in line]
        whole: list[list[str]] = []
        for text in texts:
            if whole and text[0] not in " ," and whole[-1][-1] != ",":
                whole[-1].append(text)
            else:
                whole.append([text])
        words += ["".join(group).strip() for group in whole for _ in group]
    return index, code, words


def test_the_share_is_that_of_the_magnitude_on_whole_words(planted) -> None:
    index, code, words = planted
    finder = Finder(index)
    for term in ("sea", "research", "search", "war", "brain", "rain"):
        share = finder.words.share(term)
        on = torch.tensor([word == term for word in words])
        for latent in range(4):
            # "search" after the end of a context stands alone, "research" is one word of two tokens.
            expected = float(code[on, latent].sum() / code[:, latent].sum())
            assert share[latent] == pytest.approx(expected, abs=0.02), (term, latent)


def test_latents_about_the_word_come_first(planted) -> None:
    finder = Finder(planted[0])
    assert finder.find("sea")["latent"].tolist() == [0, 4, 1]  # by share; two firings prove little
    assert finder.find("SEA ")["latent"].tolist() == [0, 4, 1]
    assert 0 not in finder.find("research")["latent"].tolist()
    assert finder.find("nothing").empty


def test_several_words_are_wanted_together(planted) -> None:
    finder = Finder(planted[0])
    assert finder.find("war")["latent"].tolist()[0] == 2
    assert finder.find("world war")["latent"].tolist()[0] == 3
    assert finder.find("m*")["latent"].tolist() == finder.find("music melody")["latent"].tolist()


def test_own_labels_and_numbers_come_first(planted) -> None:
    finder = Finder(planted[0])
    notes = {7: {"label": "World wars", "note": "not the word itself"}, 2: {"label": "x", "note": ""}}
    assert finder.find("world wars", notes=notes)["latent"].tolist()[0] == 7
    assert finder.find("itself", notes=notes)["latent"].tolist() == [7]
    assert finder.find("sea", notes=notes)["latent"].tolist()[0] == 0
    assert finder.find("#6")["latent"].tolist() == [6]
    assert finder.find("99").empty
    with pytest.raises(UserError, match="running the model"):
        finder.find("the [[sea]]")


def test_one_column_can_be_searched_alone(planted) -> None:
    finder = Finder(planted[0])
    assert set(finder.find("sea", "label")["latent"]) == {0} == set(finder.find("boat", "label")["latent"])
    assert finder.find("sea", "promotes").empty  # the index has no logit effects
    every = finder.find("")
    assert len(every) == 9 and every["telling"].is_monotonic_decreasing


def test_words_of_the_same_company_are_related(planted) -> None:
    found, near = Finder(planted[0]).related("song")
    assert set(found["latent"].tolist()[:2]) == {5, 6}  # 6 has "melody" and "music", never "song"
    assert near[0] == "music"
    empty, none = Finder(planted[0]).related("zebra")
    assert empty.empty and none == []


def test_an_explanation_is_searched(planted, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(planted[0].run_folder, tmp_path / "run")
    nothing = JudgeScore(0, 0, 0, 0, 0)
    save(tmp_path / "run", Explanation(7, 1, "punctuation between zebras", nothing, nothing, "a", "b"))
    finder = Finder(FeatureIndex(tmp_path / "run"))
    assert finder.find("zebras")["latent"].tolist() == [7]
    assert finder.related("zebras")[0]["latent"].tolist()[0] == 7


def test_several_saes_are_searched_at_once(planted) -> None:
    finder = Finder(planted[0])
    found = find_in({"a": finder, "b": finder}, "sea", {"b": {7: {"label": "sea", "note": ""}}}, top=2)
    assert set(found["SAE"]) == {"a", "b"} and len(found) == 4
    assert found[found["SAE"] == "b"]["latent"].tolist() == [0, 7]
    assert find_in({}, "sea").empty
    # The first of those that fit: what is left out takes no place of them.
    rest = find_in({"a": finder}, "sea", top=2, keep=lambda rows: rows[rows["latent"] != 0])
    assert rest["latent"].tolist() == finder.find("sea")["latent"].tolist()[1:3]
    assert find_in({"a": finder}, "sea", where="label")["latent"].tolist() == [0]


def test_an_index_of_the_first_release_is_searched_by_its_tokens() -> None:
    index = FeatureIndex("tests/data/v0.1.0/runs/lm_post")
    assert "words" not in index.meta["columns"]
    row = max((index.latent(n) for n in range(index.d_sae)), key=lambda row: row["count"])
    token = next(t for t in row["top_tokens"] if t.strip().isalpha())
    found = Finder(index).find(token)
    share = {t.strip().lower(): 0.0 for t in row["top_tokens"]}
    for text, count in zip(row["top_tokens"], row["top_token_counts"]):
        share[text.strip().lower()] += count / row["count"]
    own = found[found["latent"] == row["latent"]]["share"].iloc[0]
    assert own == pytest.approx(share[token.strip().lower()], rel=1e-4) and np.isfinite(found["score"]).all()


def test_the_command_names_its_numbers_and_the_sae(capsys: pytest.CaptureFixture[str]) -> None:
    run = str(checkpoints() / "abs_topk")
    main(["find", "the", run, "--count", "3"])
    said = capsys.readouterr()
    assert f"{run}: " in said.err and "dense latents are hidden" in said.err
    assert all("fires on " in line and "%" in line for line in said.out.splitlines())
