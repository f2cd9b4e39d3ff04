"""A new format is one file: read by ``load``, listed by the app, fetched from a hub, offered by ``convert``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saelab import load
from saelab.cli import main
from saelab.errors import UserError
from saelab.interop import FORMATS, Format, export, register
from saelab.interop.fetch import wanted_files
from saelab.workspace import Workspace
from tests.interop.examples import example, probe

TOY = '''
"""A toy tool's SAEs: one file ``model.toy``, ReLU, nothing subtracted."""

import torch

from saelab.interop.foreign import Foreign
from saelab.interop.format import Format, register, subtracting_bias
from saelab.interop.reading import matrix_shape, checked, read_tensors


def sniff(path):
    return path.suffix == ".toy" or (path / "model.toy").is_file()


def read(path):
    file = path / "model.toy" if path.is_dir() else path
    raw = read_tensors(file)
    d_in, d_sae = matrix_shape(raw, "up", file)
    t = checked(raw, {"up": (d_in, d_sae), "bias": (d_sae,), "down": (d_sae, d_in), "offset": (d_in,)}, file)
    return Foreign("toy", "relu", t["down"], t["offset"], t["up"], t["bias"], notes=["a toy"])


def write(form, folder, metadata):
    t = form.tensors
    state = {"up": t["W_enc"], "bias": subtracting_bias(form), "down": t["W_dec"], "offset": t["b_dec"]}
    torch.save({name: value.detach().clone() for name, value in state.items()}, folder / "model.toy")


register(Format("toy", ("*.toy",), sniff, read, write))
'''


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[None]:
    file = tmp_path / "toy.py"
    file.write_text(TOY)
    before = dict(FORMATS)
    spec = importlib.util.spec_from_file_location("saelab.interop.formats.toy", file)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield
    FORMATS.clear()
    FORMATS.update(before)


@pytest.mark.usefixtures("toy")
def test_one_file_is_all_that_a_format_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae, x = example("relu"), probe()
    export(sae, tmp_path / "work" / "theirs", "toy")
    for path in (tmp_path / "work" / "theirs", tmp_path / "work" / "theirs" / "model.toy"):
        torch.testing.assert_close(load(path)(x), sae(x), rtol=1e-4, atol=1e-5)
    (run,) = Workspace.scan(tmp_path / "work").runs.values()
    assert (run.name, run.format, run.notes) == ("theirs", "toy", ["a toy"])
    assert "*.toy" in wanted_files()
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "toy" in capsys.readouterr().out
    main(["convert", str(tmp_path / "work" / "theirs"), str(tmp_path / "new"), "--to", "toy"])
    assert (tmp_path / "new" / "model.toy").is_file()


def test_the_modules_of_the_folder_are_the_formats() -> None:
    from saelab.interop import formats

    files = {path.stem for path in Path(formats.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(FORMATS)
    for name, form in FORMATS.items():
        assert form.name == name and form.files and form.read.__module__.endswith(f".{name}")


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(UserError, match=r"'openai' is taken by saelab\.interop\.formats\.openai"):
        register(Format("openai", ("*.x",), lambda path: False, lambda path: pytest.fail()))
    assert FORMATS["openai"].files == ("*.pt", "*.pth")
