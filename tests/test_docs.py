"""The README is true: its Python runs, its commands exist and take the options it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from saelab import cli

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda b: b.strip().splitlines()[0])
def test_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("saelab ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_take_the_options_shown(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, name, *args = shlex.split(line, comments=True)
    variant = ["--variant", args[args.index("--variant") + 1]] if "--variant" in args else []
    with pytest.raises(SystemExit) as stop:
        cli.main([name, *variant, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in (arg for arg in args if arg.startswith("--")):
        assert re.search(rf"{option}\b", shown), f"{name} does not know {option}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (Path(__file__).parent.parent / target).exists(), target


def test_readme_names_every_variant_and_command() -> None:
    from saelab.sae import VARIANTS

    for variant in VARIANTS:
        assert f"`{variant}`" in README, f"the README does not name the variant {variant}"
