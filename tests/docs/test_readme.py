"""The README and docs/ are true: commands take the options shown, and numbers are those of the saved results."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from saelab import cli
from saelab.reproduce.results import claims, markdown, read_ledgers
from saelab.sae import VARIANTS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CLAIMS = (ROOT / "docs" / "claims.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
SHELL = re.compile(r"```(?:bash|sh)\n(.*?)```", flags=re.S)


def commands(text: str) -> list[str]:
    """The lines of a page's shell blocks, fenced or indented, that call saelab."""
    fenced = [line for block in SHELL.findall(text) for line in block.splitlines()]
    indented = re.findall(r"^    (saelab .*)$", text, flags=re.M)
    return [line for line in [*fenced, *indented] if line.startswith("saelab ")]


COMMANDS = sorted({line for page in PAGES for line in commands(page.read_text())})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_take_the_options_shown(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, name, *args = shlex.split(line, comments=True)
    part = args[:1] if name == "cache" else []
    variant = ["--variant", args[args.index("--variant") + 1]] if "--variant" in args else []
    if variant and variant[1] not in VARIANTS:
        variant = []  # the page has just added it
    if name in ("train", "sweep") and "--tokens" in args:
        part = ["--tokens", "1"]  # the command harvests, too, and has more options
    with pytest.raises(SystemExit) as stop:
        cli.main([name, *part, *variant, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in (arg for arg in args if arg.startswith("--")):
        assert re.search(rf"{option}\b", shown), f"{name} does not know {option}"


def test_there_are_commands_to_check() -> None:
    assert len(commands(README)) >= 10
    assert len(COMMANDS) > 30


def test_readme_names_every_variant_and_command() -> None:
    for variant in VARIANTS:
        assert f"`{variant}`" in README, f"the README does not name the variant {variant}"
    for command in cli.COMMANDS:
        assert re.search(rf"\b{command}\b", README), f"the README does not name the command {command}"


def test_the_claims_are_those_of_the_ledgers() -> None:
    ledgers = read_ledgers(ROOT / "notebooks" / "results")
    table = CLAIMS.partition("<!-- claims -->\n")[2].partition("<!-- /claims -->")[0]
    assert table.strip() == markdown(ledgers).strip()
    verdicts = [row["verdict"] for row in claims(ledgers)]
    held = verdicts.count("supported") + verdicts.count("reproduced")  # as ledgers of 0.1.0 say
    counted = f"{held} of {len(verdicts)} held"
    assert counted in " ".join(README.split())


def test_the_readme_can_be_read_in_two_minutes() -> None:
    assert 900 <= len(README.split()) <= 1200
