"""The README is true: its commands exist and take the options it shows; test_how_to.py runs its code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from saelab import cli

README = (Path(__file__).parents[2] / "README.md").read_text()


COMMANDS = [line.strip() for line in README.splitlines() if line.strip().startswith("saelab ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_take_the_options_shown(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, name, *args = shlex.split(line, comments=True)
    part = args[:1] if name == "cache" else []
    variant = ["--variant", args[args.index("--variant") + 1]] if "--variant" in args else []
    with pytest.raises(SystemExit) as stop:
        cli.main([name, *part, *variant, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in (arg for arg in args if arg.startswith("--")):
        assert re.search(rf"{option}\b", shown), f"{name} does not know {option}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (Path(__file__).parents[2] / target).exists(), target


def test_readme_names_every_variant_and_command() -> None:
    from saelab.sae import VARIANTS

    for variant in VARIANTS:
        assert f"`{variant}`" in README, f"the README does not name the variant {variant}"
