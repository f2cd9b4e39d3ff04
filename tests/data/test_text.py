"""Text sources and packing: every document arrives whole, and every token knows where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from saelab.data.packing import pack, resolve_bos
from saelab.data.text import files, from_documents, open_text, wikipedia
from saelab.errors import UserError
from saelab.lm.tokens import token_ids
from tests import tiny_lm

DOCUMENTS = ["the cat sat", "rain fell over old roofs", "seven ships left the harbour at dawn"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_lm.tokenizer()


def write(folder: Path, kind: str, documents: list[str] = DOCUMENTS, column: str = "text") -> Path:
    path = folder / f"data.{kind}"
    records = [{column: d, "n": i} for i, d in enumerate(documents)]
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text(documents[0])
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "story"])
def test_local_files(tmp_path: Path, kind: str, column: str) -> None:
    source = open_text(write(tmp_path, kind, column=column))
    assert list(source.documents()) == DOCUMENTS
    assert list(open_text(str(tmp_path / f"data.{kind}"), column=column).documents()) == DOCUMENTS
    with pytest.raises(UserError, match=f"no text field 'body'; it has {column}"):
        list(open_text(tmp_path / f"data.{kind}", column="body").documents())


def test_a_text_file_is_one_document_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 50)
    content = "\n".join(tiny_lm.sentences(9, seed) for seed in range(20))
    (tmp_path / "a.txt").write_text(content)
    source = open_text(tmp_path / "a.txt")
    assert len(list(source.pieces())) > 5
    assert list(source.documents()) == [content]


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    for name, content in [("b.txt", "two"), ("a.txt", "one"), ("sub/c.txt", "three"), ("notes.md", "no")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert list(open_text(tmp_path).documents()) == ["one", "two", "three"]


def test_datasets_saved_to_disk_and_hub_layouts(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": DOCUMENTS, "n": [1, 2, 3]})
    data.save_to_disk(str(tmp_path / "saved"))
    assert list(open_text(tmp_path / "saved").documents()) == DOCUMENTS
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match="no split 'dev'; it has train"):
        open_text(tmp_path / "splits", split="dev")


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    before = open_text(path).fingerprint
    assert open_text(path).fingerprint == before
    write(tmp_path, "jsonl", DOCUMENTS[::-1])
    assert open_text(path).fingerprint != before


def test_bad_text_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2 is not valid JSON"):
        list(open_text(tmp_path / "bad.jsonl").documents())
    (tmp_path / "bad.parquet").write_text("not parquet at all")
    with pytest.raises(UserError, match=r"bad\.parquet is damaged"):
        list(open_text(tmp_path / "bad.parquet").documents())
    for name in ("latin.txt", "latin.jsonl"):
        (tmp_path / name).write_bytes('{"text": "déjà"}'.encode("latin-1"))
        with pytest.raises(UserError, match=f"{name} is not UTF-8"):
            list(open_text(tmp_path / name).documents())
    whole = write(tmp_path, "parquet").read_bytes()
    (tmp_path / "torn.parquet").write_bytes(whole[:8] + bytes(len(whole) // 2) + whole[8 + len(whole) // 2 :])
    with pytest.raises(UserError, match=r"torn\.parquet is damaged"):
        list(open_text(tmp_path / "torn.parquet").documents())
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="saved cannot be read as a saved dataset"):
        open_text(tmp_path / "saved")
    (tmp_path / "pic.png").write_bytes(b"")
    with pytest.raises(UserError, match="text comes as"):
        open_text(tmp_path / "pic.png")
    with pytest.raises(UserError, match="does not exist"):
        open_text(tmp_path / "nowhere.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        open_text(tmp_path / "empty")
    monkeypatch.setattr(wikipedia.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'saelab\[demo\]'"):
        open_text("wiki-sample")


@pytest.mark.parametrize("bos", ["none", "context", "document"])
@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("most", [None, 1, 30])
def test_packing_keeps_every_token_in_order(tokenizer: Any, bos: Any, batch: int, most: int | None) -> None:
    documents = [tiny_lm.sentences(n, n) for n in (3, 40, 1, 17, 60)]
    stream, owners = [], []
    for number, document in enumerate(documents):
        ids = tokenizer(document, add_special_tokens=False)["input_ids"][:most]
        ids = [0, *ids] if bos == "document" else ids
        stream += ids
        owners += [number] * len(ids)
    parts = list(pack(from_documents(documents), tokenizer, 16, bos, batch, document_tokens=most))
    if most == 1:
        assert not parts  # five documents of one token do not fill a context
        return
    tokens = torch.cat([p.tokens for p in parts])
    numbers = torch.cat([p.documents for p in parts])
    assert all(p.tokens.shape[0] == batch for p in parts[:-1])
    if bos == "context":
        assert bool((tokens[:, 0] == 0).all())
        tokens, numbers = tokens[:, 1:], numbers[:, 1:]
    kept = len(stream) // tokens.shape[1] * tokens.shape[1]
    assert tokens.flatten().tolist() == stream[:kept]
    assert numbers.flatten().tolist() == owners[:kept]


def test_bos_is_explicit(tokenizer: Any) -> None:
    class NoBos:
        bos_token_id = None

    assert resolve_bos("auto", tokenizer) == "context"
    assert resolve_bos("auto", NoBos()) == "none"
    with pytest.raises(UserError, match="no BOS token"):
        resolve_bos("context", NoBos())
    with pytest.raises(UserError, match="bos='always' is not one of"):
        resolve_bos("always", tokenizer)  # pyright: ignore[reportArgumentType]


@pytest.mark.smollm2
def test_the_wikipedia_sample() -> None:
    source = open_text("wiki-sample")
    documents = source.documents()
    first = next(documents)
    assert first.startswith("Anarchism\n\n")
    assert "'''" not in first and "[[" not in first and "\n\n\n" not in first
    assert 1 + sum(1 for _ in documents) == 106


def test_halves_of_characters_become_the_replacement_character(tmp_path: Path, tokenizer: Any) -> None:
    """JSON may hold them; no tokenizer takes them."""
    (tmp_path / "t.jsonl").write_text('{"text": "the \\ud800 cat sat on a \\udfff mat"}\n' * 20)
    packed = next(iter(pack(open_text(tmp_path / "t.jsonl"), tokenizer, 10, "none", 1)))
    expected = tokenizer("the \ufffd cat sat on a \ufffd mat", add_special_tokens=False)["input_ids"]
    assert packed.tokens[0].tolist() == (expected * 2)[:10]
    assert token_ids(tokenizer, "a \ud800 mat", bos=False) == token_ids(tokenizer, "a \ufffd mat", bos=False)


@pytest.mark.parametrize("values", [[["the cat", "sat"]], [{"a": "the cat"}], [b"the cat"], [5]])
def test_a_parquet_column_that_is_no_text_is_named(values: Any, tmp_path: Path, tokenizer: Any) -> None:
    pyarrow.parquet.write_table(pa.table({"text": values * 50}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="has a field 'text' that holds something else than text"):
        next(iter(pack(open_text(tmp_path / "t.parquet"), tokenizer, 10, "none", 1)))
