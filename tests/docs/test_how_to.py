"""The code of the README and of docs/ runs: every python and bash block of a page, in order, in one folder.

The folder holds the model, text, cache and run that the pages name. Sizes are shrunk by the rules of ``SMALL``, and the
README's model and text are replaced by those of the how-tos.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from saelab import cli
from saelab.interop.format import FORMATS
from saelab.sae import VARIANTS
from saelab.steering import OPERATIONS
from tests import tiny_lm

FOLDER = Path(__file__).parents[2] / "docs"
PAGES = [FOLDER.parent / "README.md", *sorted(FOLDER.glob("*.md")), *sorted((FOLDER / "how-to").glob("*.md"))]
# The value of an option, on the command line or in Python, and what it becomes.
SMALL = {
    "tokens": 4000,
    "d_sae": 64,
    "epochs": 1,
    "batch_size": 256,
    "k": 4,
    "sample_tokens": 512,
    "held_out_tokens": 512,
    "max_new_tokens": 3,
}
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", flags=re.S)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


def shrunk(code: str) -> str:
    if code.startswith("saelab plan"):
        return code  # formulas cost nothing
    for name, ours in {"smollm2": "my-model", "wiki-sample": "my-text.jsonl", "blocks.9.": "blocks.2."}.items():
        code = code.replace(name, ours)
    for name, value in SMALL.items():
        code = re.sub(rf"(\b{name} ?= ?)[\d_]+", rf"\g<1>{value}", code)
        code = re.sub(rf"(--{name.replace('_', '-')}) \d+", rf"\1 {value}", code)
    return code


def run(language: str, code: str, names: dict[str, object], page: str) -> None:
    if language == "python":
        exec(compile(code, page, "exec"), names)
        return
    for line in code.splitlines():
        program, *args = shlex.split(line, comments=True)
        assert program == "saelab", f"{page}: {line} is not run by this test; indent it instead"
        if args[0] != "app":  # it would wait for a browser
            cli.main(args)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and the cache and run that the first page makes of them."""
    folder = tmp_path_factory.mktemp("how-to")
    tiny_lm.save_llama(folder / "my-model")
    documents = [{"text": tiny_lm.sentences(80, seed)} for seed in range(70)]
    (folder / "my-text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    page = (FOLDER / "how-to" / "own-model.md").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, code in BLOCK.findall(page):
            if "saelab harvest" in code:
                run(language, shrunk(code), {}, "own-model.md")
    return folder


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda path: path.stem)
def test_a_page_runs(page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    if page.stem in {"own-model", "README"}:  # they make them themselves
        shutil.rmtree(tmp_path / "cache")
        shutil.rmtree(tmp_path / "sae")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with patch.dict(VARIANTS), patch.dict(OPERATIONS), patch.dict(FORMATS):  # pages add to them
        for language, code in BLOCK.findall(page.read_text()):
            run(language, shrunk(code), names, page.name)


def test_pages_are_listed_and_links_lead_somewhere() -> None:
    listed = (FOLDER / "index.md").read_text()
    for page in PAGES:
        text = page.read_text()
        assert page.stem in listed or page.stem in {"index", "README"}, f"{page.name} is not in docs/index.md"
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_options_of_commands_that_are_not_run_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """``torchrun`` lines are indented instead of fenced: starting processes is tested elsewhere."""
    checked = 0
    for page in PAGES:
        for command, rest in re.findall(r"^    torchrun .* -m saelab (\w+) (.*)$", page.read_text(), flags=re.M):
            with pytest.raises(SystemExit):
                cli.main([command, "--help"])
            shown = capsys.readouterr().out
            for option in re.findall(r"--[\w-]+", rest):
                assert re.search(rf"{option}\b", shown), f"{page.name}: {command} does not know {option}"
                checked += 1
    assert checked
