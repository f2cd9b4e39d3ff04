"""What is collected on other machines: one with a GPU, and one that has little more than PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.devices import devices
from tests.kernels.backends import places

# A finder that finds none of the packages of the command line, the app, the language models and the tables.
HIDDEN = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
"""
LACKING = {
    *("beartype", "datasets", "docstring_parser", "einops", "gguf", "huggingface_hub", "pandas", "plotly", "pyarrow"),
    *("rich", "sklearn", "streamlit", "transformer_lens", "transformers", "tyro"),
}


def test_a_gpu_takes_the_place_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(devices()) == 1 + torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, gpu = devices()
    assert cpu == "cpu" and gpu.values == ("cuda",) and gpu.marks[0].name == "gpu"
    found = {getattr(place, "values", [place])[0]: getattr(place, "marks", ()) for place in places(gpu=True)}
    assert found["reference"] == found["numba"] == () and "triton" not in found
    pytest.importorskip("triton")
    assert [found[name][0].name for name in ("reference@cuda", "triton@cuda")] == ["gpu", "gpu"]


@pytest.mark.slow
def test_the_tests_are_collected_on_a_machine_with_little_more_than_pytorch(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.format(names=LACKING))
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    # Plugins of packages that are hidden would fail before our tests are looked at.
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ran = subprocess.run([*command, "tests"], cwd=root, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    # Kernels, SAEs, caches and training are tested there; the rest says what it lacks.
    for name in ("kernels/test_parity.py", "kernels/test_gradients.py", "sae/test_variants.py"):
        assert f"tests/{name}::" in ran.stdout, name
    for name in ("training/test_training.py", "data/test_cache.py", "training/test_feed.py"):
        assert not (root / "tests" / name).exists() or f"tests/{name}::" in ran.stdout, name
    assert "tests/cli/test_cli.py:1: rich is not installed" in ran.stdout
