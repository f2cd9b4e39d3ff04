"""Consoles and locales other than UTF-8: no command fails on a letter, and files are UTF-8 whatever the locale."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from saelab.cli import console as consoles
from saelab.errors import UserError
from saelab.sae.weights import save
from saelab.workspace.recipes import recipe_folder
from tests.steering.models import HOOK, folder
from tests.steering.test_steering import RUN

TEXT = "zażółć gęślą jaźń, 猫 und 🔥 "
COMMANDS = """
import json, sys
from pathlib import Path
from saelab.cli import main

root, run, model, text = Path(sys.argv[1]), sys.argv[2], sys.argv[3], TEXT
(root / "t.jsonl").write_bytes((json.dumps({"text": 9 * text}, ensure_ascii=False) + "\\n").encode() * 9)
harvest = ["harvest", "--model", model, "--hook", HOOK, "--device", "cpu", "--context-length", "16", "--out"]
main([*harvest, str(root / "cache"), "--text", str(root / "t.jsonl")])
main(["cache", "info", str(root / "cache")])
main(["index", run, "--cache", str(root / "cache"), "--model", "none", "--device", "cpu", "--overwrite"])
main(["inspect", run])
import saelab.cli.commands.steer as steer
steer.texts = lambda *rest: {"texts": [{"prompt": text, "steered": text}]}
main(["steer", run, "--latent", "3", "--prompt", text, "--device", "cpu"])
for command in ([], ["steer", "--help"], ["harvest", "--help"]):
    try:
        main(command)
    except SystemExit as end:
        assert not end.code
try:
    main(["inspect", str(root / "nowhere")])
except SystemExit as end:
    assert end.code == 2
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", [pytest.param("cp1252", marks=pytest.mark.minutes), "ascii"])
def test_commands_print_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    save(RUN.sae, tmp_path / "run", {"hook_name": HOOK, "model_name": folder(), "rms_norm": 12.0})
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": encoding}
    script = f"TEXT, HOOK = {TEXT!r}, {HOOK!r}\n{COMMANDS}"
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    args = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(tmp_path / "run"), folder()]
    done = subprocess.run(args, env=os.environ | plain, capture_output=True, timeout=600, check=False)
    printed = done.stdout.decode(encoding)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert "\\u0142" in printed and "\\u732b" in printed
    assert "ó" in printed if encoding == "cp1252" else "\\xf3" in printed
    assert "error:" in done.stderr.decode(encoding)


@pytest.mark.parametrize("name", ["con", "NUL", "Com1", "lpt9", "aux-"])
def test_recipes_have_names_that_windows_allows(tmp_path: Path, name: str) -> None:
    assert recipe_folder(tmp_path, name).name == f"recipe-{name.strip('-')}"
    assert recipe_folder(tmp_path, f"{name}x").name == f"{name}x"
    with pytest.raises(UserError, match="give the recipe a name"):
        recipe_folder(tmp_path, "..\\../")


def test_a_live_display_in_a_file_ends_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(consoles, "console", Console(file=written))
    with pytest.raises(KeyError), consoles.live_view() as live:
        live.update("half of it")
        raise KeyError
    assert written.getvalue().endswith("half of it\n")
