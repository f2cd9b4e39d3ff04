"""The index of a byte-level vocabulary in other scripts: whole characters in windows, top tokens, labels and search."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saelab import viz
from saelab.data.cache import ActivationCache
from saelab.features import FeatureIndex, build_index
from saelab.features.explanations.prompts import active_places, marked
from saelab.features.indexing.config import IndexConfig
from saelab.features.indexing.corpus import Corpus
from saelab.features.search import catalogue, find, narrow, tokens_in
from saelab.lm.tokens import vocabulary
from tests.features.lookup import Lookup
from tests.lm.languages import SENTENCES, train

CONTEXT = 25  # cuts characters of three tokens


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    own = train("byte fallback")
    text = SENTENCES["Japanese"] * 40
    ids = torch.tensor(own(text, add_special_tokens=False)["input_ids"])
    acts = torch.randn(len(ids), 4)
    acts[:, 0] = torch.arange(len(ids))
    folder = tmp_path_factory.mktemp("c") / "cache"
    return ActivationCache.from_tensors(folder, acts, ids, context_length=CONTEXT, vocabulary=vocabulary(own))


@pytest.fixture(scope="module")
def index(cache: ActivationCache, tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    """Latent 0 fires on all three tokens of 猫, latent 1 on the last one of each character, latent 2 on its first."""
    shards = list(cache.shard_texts())
    text = torch.cat([ids for ids, *_ in shards])
    parts = cache.vocabulary.parts
    cat = torch.tensor([parts[n][0] if n in parts else -1 for n in text.tolist()])
    code = torch.zeros(len(text), 3)
    for place in range(len(text) - 2):
        if cat[place : place + 3].tolist() == list("猫".encode()):
            code[place : place + 3, 0] = 1 + torch.rand(3)
            code[place + 2, 1], code[place, 2] = 2, 3
    return build_index(Lookup(code), cache, tmp_path_factory.mktemp("r") / "run", config=IndexConfig(before=5, after=5))


def test_windows_show_the_text(index: FeatureIndex) -> None:
    for latent in range(3):
        for example in index.examples(latent):
            if "<" in example.text:  # a character that the end of a context cuts
                continue
            assert example.text in SENTENCES["Japanese"] * 2
            assert len(example.strings) == len(example.tokens) == len(example.activations)
    tops = [example.strings[example.focus] for example in index.examples(1, kind="top")]
    assert "猫" in tops and set(tops) <= {"猫", "<8C AB>", "<AB>"}  # the others: cut by the start of a context


def test_a_token_counts_as_its_character(index: FeatureIndex) -> None:
    for latent in range(3):
        assert index.latent(latent)["top_tokens"][0] == "猫"
    assert index.latent(0)["label"] == "token: 猫" and index.latent(0)["label_score"] > 0.9
    assert sorted(find(catalogue(index), "猫", "fires on")["latent"]) == [0, 1, 2]


def test_an_activation_on_a_part_of_a_character_is_seen(index: FeatureIndex) -> None:
    example = next(e for e in index.examples(2, kind="top") if "<" not in e.text)
    assert example.strings[example.focus] == ""
    html = viz.token_strip(example.strings, example.activations, viz.LIGHT, focus=example.focus)
    assert ">·</span>" in html
    assert "<<猫>>" in marked(example, active_places(example))


def test_the_corpus_agrees_with_the_vocabulary(cache: ActivationCache, tmp_path: Path) -> None:
    corpus = Corpus(cache, tmp_path / "corpus", cache.n_rows)
    names = corpus.name_parts(cache.vocabulary, list(cache.vocabulary))
    for start in range(0, len(corpus.text), CONTEXT):
        ids = corpus.text[start : start + CONTEXT].tolist()
        shown = [names[number] for number in corpus.shown[start : start + CONTEXT]]
        assert shown == cache.vocabulary.side_by_side(ids)
        assert "\ufffd" not in "".join(names[number] for number in corpus.units[start : start + CONTEXT])


def test_marks_cover_every_part_of_a_character() -> None:
    strings = ["<s>", "", "", "吾", "輩", "", "", "猫", "は"]
    assert tokens_in(strings, [(2, 3)], offset=1) == [False] * 5 + [True] * 3 + [False]
    assert tokens_in(strings, [(0, 1)], offset=1) == [False] + [True] * 3 + [False] * 5


def test_the_role_of_the_firing_token_is_shown(tmp_path: Path) -> None:
    from saelab.data.cache import CacheWriter, Manifest
    from saelab.data.cache.storage import Folder
    from saelab.data.chat import ROLES

    roles = torch.tensor([ROLES.index(name) for name in ("template", "user", "template", "assistant")] * 50)
    acts = torch.randn(200, 4)
    acts[:, 0] = torch.arange(200)
    writer = CacheWriter(Folder(tmp_path / "cache"), Manifest(d_in=4, context_length=4))
    places = torch.arange(200)
    writer.write_cast(acts, places % 7, places, places // 4, None, 0, roles)
    writer.write_vocabulary([f" w{i}" for i in range(7)])
    writer.finish()
    code = torch.zeros(200, 2)
    code[3::4, 0], code[1::4, 1] = 1.0, 2.0
    index = build_index(Lookup(code), ActivationCache(tmp_path / "cache"), tmp_path / "run")
    for latent, role in enumerate(("assistant", "user")):
        found = index.examples(latent, kind="top")
        assert found and {example.role for example in found} == {role}
        assert f"<br>{role}<" in viz.example_list(found, viz.LIGHT)
    table = catalogue(index)
    assert table["role"].tolist() == ["assistant", "user"]
    assert narrow(table, role="user")["latent"].tolist() == [1]


def test_text_that_is_no_chat_has_no_roles(index: FeatureIndex) -> None:
    table = catalogue(index)
    assert set(table["role"]) == {""} and len(table) == index.d_sae
