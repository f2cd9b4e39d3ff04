"""Records without text are left out and counted, never replaced by another field; every common kind of file is read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saelab.data.text import TextSource, open_text
from saelab.data.text.rows import open_hub
from saelab.errors import UserError

# A crawled page whose text is missing must not become its own address.
RECORDS: list[dict[str, Any]] = [
    {"url": "http://a", "text": "one"},
    {"url": "http://b", "text": None},
    {"url": "http://c", "text": ""},
    {"url": "http://d", "text": "two"},
]
SPARSE: list[dict[str, Any]] = [*RECORDS, {"url": "http://e"}]


def jsonl(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "pages.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def parquet(folder: Path, records: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), folder / "pages.parquet")
    return folder / "pages.parquet"


def saved(folder: Path, records: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.Dataset.from_list(records).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def streamed(folder: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, typed: bool) -> None:
    """Make ``someone/pages`` a stream of the records that does, or does not, know its columns."""
    import datasets

    if typed:
        found = datasets.load_dataset("json", data_files=str(jsonl(folder, records)), split="train", streaming=True)
    else:
        found = datasets.IterableDataset.from_generator(lambda: iter(records))
    assert (found.features is not None) == typed
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: found)


@pytest.fixture(params=["jsonl", "parquet", "saved", "streamed", "untyped"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def open_records(records: list[dict[str, Any]], column: str | None = None) -> TextSource:
        if request.param in ("streamed", "untyped"):
            with monkeypatch.context() as patch:
                streamed(tmp_path, records, patch, request.param == "streamed")
                return open_hub("someone/pages", "train", column, "give another")
        write = {"jsonl": jsonl, "parquet": parquet, "saved": saved}[request.param]
        return open_text(write(tmp_path, records), column=column)

    return open_records


def test_a_missing_text_is_left_out_and_counted(opened: Callable[..., TextSource]) -> None:
    for column in (None, "text"):
        source = opened(RECORDS, column)
        assert list(source.documents()) == ["one", "two"]
        assert source.left_out == {"records without 'text'": 1, "records with an empty 'text'": 1}
        list(source.documents())
        assert sum(source.left_out.values()) == 2  # of one reading, not of two


def test_a_text_that_is_null_at_first_is_still_the_text(opened: Callable[..., TextSource]) -> None:
    source = opened([{"url": "http://b", "text": None}, *RECORDS])
    assert list(source.documents()) == ["one", "two"]


def test_a_column_that_is_not_there_names_those_that_are(opened: Callable[..., TextSource]) -> None:
    with pytest.raises(UserError, match=r"has no text field 'body'; it has url, text"):
        list(opened(RECORDS, "body").documents())
    with pytest.raises(UserError, match=r"name the text column: it has url, title"):
        list(opened([{"url": "a", "title": "b"}]).documents())
    with pytest.raises(UserError, match=r"name the text column: it has none with text, only n"):
        list(opened([{"n": 1}]).documents())


def test_fields_that_only_some_records_have(tmp_path: Path) -> None:
    source = open_text(jsonl(tmp_path, SPARSE))
    assert list(source.documents()) == ["one", "two"]
    assert source.left_out["records without 'text'"] == 2
    wrong = [{"text": "one"}, {"text": 3}, {"text": ["a"]}]
    source = open_text(jsonl(tmp_path, wrong))
    assert list(source.documents()) == ["one"] and source.left_out == {"records whose 'text' is not text": 2}
    late = [{"url": "http://a"}] * 1000 + [{"url": "http://b", "text": "one"}]
    with pytest.raises(UserError, match=r"pages.jsonl:1001 has a field 'text', the records before have 'url'"):
        list(open_text(jsonl(tmp_path, late)).documents())


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n')
    assert list(open_text(tmp_path).documents()) == ["one", "two"]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),  # members one after the other, as logs have
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: bytes(
        pa.compress(data[:20], "zstd", asbytes=True) + pa.compress(data[20:], "zstd", asbytes=True)
    ),
}


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    data = "\n".join(map(json.dumps, RECORDS)).encode()
    path = tmp_path / f"pages.JSONL.{ending}"
    path.write_bytes(PACKERS[ending](data))
    assert list(open_text(path).documents()) == ["one", "two"]
    (tmp_path / f"notes.txt.{ending}").write_bytes(PACKERS[ending]("zażółć gęślą jaźń, one line more".encode()))
    assert "zażółć gęślą jaźń, one line more" in open_text(tmp_path).documents()
    whole = PACKERS[ending]((data + b"\n") * 400)
    for broken in (whole[: len(whole) // 2], b"not compressed"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=rf"pages\.JSONL\.{ending} is damaged .*compress the file again"):
            list(open_text(path).documents())


def test_dictionary_columns_of_parquet(tmp_path: Path) -> None:
    column = pa.array(["one", None, "two", "one"]).dictionary_encode()
    for kind in (column, column.cast(pa.dictionary(pa.int8(), pa.large_string()))):
        pq.write_table(pa.table({"text": kind, "url": ["a", "b", "c", "d"]}), tmp_path / "a.parquet")
        source = open_text(tmp_path / "a.parquet")
        assert list(source.documents()) == ["one", "two", "one"]
        assert source.left_out == {"records without 'text'": 1}


def test_folders_say_what_they_left_out(tmp_path: Path) -> None:
    contents = {"b.txt": "two", "a.TXT": "one", "notes.md": "no", "picture.png": "no", "._a.TXT": "no", "empty.txt": ""}
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    source = open_text(tmp_path)
    assert list(source.documents()) == ["one", "two"]
    kinds = {f"files of another kind ({ending})": 1 for ending in (".md", ".png")}
    assert source.left_out == {**kinds, "hidden files": 1, "empty files": 1}


def test_several_sources_are_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("zero", encoding="utf-8")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x.md").write_text("no", encoding="utf-8")
    (tmp_path / "f" / "y.txt").write_text("last", encoding="utf-8")
    names = [tmp_path / "a.txt", jsonl(tmp_path, RECORDS), tmp_path / "f"]
    source = open_text(names)
    assert list(source.documents()) == ["zero", "one", "two", "last"]
    assert sum(source.left_out.values()) == 3
    pieces = source.pieces()
    assert [next(pieces)[1] for _ in range(3)][-1] == "two" and sum(source.left_out.values()) == 2
    assert source.name == " + ".join(map(str, names))
    assert source.fingerprint != open_text(names[::-1]).fingerprint
    assert open_text(names[:1]).fingerprint == open_text(names[0]).fingerprint


def test_a_lost_connection_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Stream:
        features = None

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield from ({"text": str(n)} for n in range(1500))
            raise RuntimeError("Server disconnected without sending a response.\nmore")

    stream: Any = Stream()
    stream.info = type("Info", (), {"version": 1, "dataset_size": 2, "download_checksums": None})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    with pytest.raises(UserError, match=r"someone/pages broke off after 1,500 records \(Server disc[^\n]*--resume"):
        list(open_text("someone/pages").documents())

    def scripts(*args: Any, **options: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found pages.py")

    monkeypatch.setattr(datasets, "load_dataset", scripts)
    with pytest.raises(UserError, match=r"cannot load the dataset 'someone/pages' \(Dataset scripts"):
        open_text("someone/pages")
