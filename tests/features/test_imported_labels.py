"""Labels that Neuronpedia exports: read, checked against the SAE, kept, searched."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab import ActivationCache, FeatureIndex
from saelab.cli import main
from saelab.errors import UserError
from saelab.features.explanations import imported_labels, read_labels
from saelab.features.search import catalogue
from saelab.runs import Run
from tests.interop import collected
from tests.interop.collected import D_IN, D_SAE

HOOK = "blocks.12.hook_resid_post"
LAYER = "12-gemmascope-res-16k"


def row(index: Any, description: str | None, layer: str = LAYER, **more: Any) -> dict[str, Any]:
    """One line of an export, with the fields it has."""
    about = {"id": f"clx{index}", "modelId": "gemma-2-2b", "layer": layer, "index": str(index), "authorId": "a"}
    made = {"explanationModelName": "gpt-4o-mini", "typeName": "oai_token-act-pair", "embedding": "[0.0, 1.0]"}
    return {**about, "description": description, **made, **more}


ROWS = [
    row(3, " negations in statements"),
    row(3, "a second one"),
    row(0, "LaTeX\nformatting"),
    row(7, ""),
    row(39, "Wörter über Flüsse – 川"),
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """In the layout that the ending says; blank lines are allowed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n"
    text = json.dumps(rows) if ".json" in path.suffixes and ".jsonl" not in path.suffixes else lines
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    return collected.gemma_scope(folder)


@pytest.mark.parametrize("name", ["batch-0.jsonl", "batch-0.jsonl.gz", "all.json", "all.json.gz"])
def test_every_kind_of_file(name: str, sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "labels" / name, ROWS)
    main(["labels", str(sae), str(file)])
    said = capsys.readouterr()
    assert "3 labels of 40 latents; left out: 1 repeated, 1 empty" in said.out
    assert "cannot be checked" not in said.err and "the labels are of" not in said.err
    known = imported_labels(sae)
    assert sorted(known) == [0, 3, 39]
    assert known[3] == ("negations in statements", f"gemma-2-2b/{LAYER}", "gpt-4o-mini", "oai_token-act-pair")
    assert known[0].text == "LaTeX formatting" and known[39].text == "Wörter über Flüsse – 川"


def test_a_folder_of_batches_and_a_second_import(sae: Path, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "explanations" / f"batch-{number}.jsonl.gz", [row(number, f"label {number}")])
    (tmp_path / "explanations" / "README.md").write_text("not labels")
    main(["labels", str(sae), str(tmp_path / "explanations")])
    assert [label.text for label in imported_labels(sae).values()] == ["label 0", "label 1", "label 2"]
    main(["labels", str(sae), str(write(tmp_path / "new.jsonl", [row(1, "better")])), "--json"])
    assert {latent: label.text for latent, label in imported_labels(sae).items()} == {1: "better"}


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([row(40, "x")], r"line 1 is of latent 40, the SAE has latents 0 to 39"),
        ([row(-1, "x")], r"latent -1, the SAE has"),
        ([row(1, "x", "13-gemmascope-res-16k")], r"13-gemmascope-res-16k, the SAE reads blocks\.12\.hook_resid_post"),
        ([row(1, "x", "12-gemmascope-mlp-16k")], r"12-gemmascope-mlp-16k, the SAE reads blocks\.12\.hook_resid_post"),
        ([row(1, "x", "12-gemmascope-att-16k")], r"12-gemmascope-att-16k, the SAE reads blocks"),
        ([row(1, "x", "12-gemmascope-transcoder-16k")], "12-gemmascope-transcoder-16k, a transcoder, not of an SAE"),
        ([row(1, "x"), row(2, "y", "12-gemmascope-res-65k")], "labels of several SAEs"),
        ([row("three", "x")], "line 1 has no index and description"),
        ([{"modelId": "m"}], "line 1 has no index and description"),
        ([row(1, "")], "holds no label"),
        ([], "holds no label"),
    ],
)
def test_labels_of_another_sae_are_refused_in_one_line(
    rows: list[dict[str, Any]], match: str, sae: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "labels.jsonl", rows)
    with pytest.raises(UserError, match=match) as error:
        read_labels([file], D_SAE, HOOK)
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit) as stopped:
        main(["labels", str(sae), str(file)])
    assert stopped.value.code == 2 and not imported_labels(sae)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"{", "a.jsonl"),
        (b"[1, 2]\n", "a.jsonl"),
        (b"\xff\xfe", "a.jsonl"),
        (b"no gzip", "a.jsonl.gz"),
        (b"{", "a.json"),
    ],
)
def test_broken_files_are_refused_in_one_line(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_labels([tmp_path / name], D_SAE)
    assert "\n" not in str(error.value) and name in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        read_labels([tmp_path / "nowhere"], D_SAE)


def test_another_model_is_named(sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["labels", str(sae), str(write(tmp_path / "a.jsonl", [row(1, "x", modelId="llama3.1-8b")]))])
    assert "the labels are of llama3.1-8b, the SAE of google/gemma-2-2b" in capsys.readouterr().err


def test_they_are_searched_and_kept_when_the_index_is_built_again(sae: Path, tmp_path: Path) -> None:
    main(["labels", str(sae), str(write(tmp_path / "a.jsonl", ROWS))])
    cache = tmp_path / "cache"
    tokens = torch.randint(0, 20, (300,))
    ActivationCache.from_tensors(
        cache, 3 * torch.randn(300, D_IN), tokens, context_length=20, vocabulary=[f" w{i}" for i in range(20)]
    )
    for again in ([], ["--overwrite"]):
        main(["index", str(sae), "--cache", str(cache), "--model", "none", *again])
        table = catalogue(FeatureIndex(sae))
        assert table["explanation"][3] == "negations in statements" and table["explanation"][5] == ""
    run = Run.open(sae)
    assert run.hook_name == HOOK


@pytest.mark.parametrize("index", [3.9, True, None, "3.9", float("inf"), [3]])
def test_an_index_that_is_no_whole_number_is_not_rounded(index: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"index": 1, "description": "x"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"index": index, "description": "cats"}) + "\n")
    with pytest.raises(UserError, match=r"b\.jsonl, line 1"):
        read_labels([tmp_path], D_SAE)


def test_halves_of_characters_and_whole_floats(sae: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"index": 2.0, "description": "a\\u0000b\\ud800c", "modelId": "\\udfff"}\n')
    main(["labels", str(sae), str(tmp_path / "a.jsonl")])
    assert imported_labels(sae)[2].text == "a\0b\ufffdc"


def test_the_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"index": 1, "description": "x"}\n\nnot json\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3, is not a file of JSON lines"):
        read_labels([tmp_path / "a.jsonl"], D_SAE)
