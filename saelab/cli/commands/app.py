"""``saelab app``: the feature browser on a folder of runs, on this machine only."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from saelab import shipped
from saelab.cli.console import console, parse
from saelab.cli.models import ModelOptions
from saelab.errors import UserError

DEMO = Path("demo")


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """What to browse, and where to serve it."""

    folder: tyro.conf.Positional[Path | None] = None
    """Folder that holds runs and caches, at any depth; nothing outside it is opened. By default `demo`, or the trained
    SAEs that come with saelab if there is no such folder."""
    port: int = 8501
    """TCP port on 127.0.0.1."""
    browser: bool = True
    """Open the page in the default browser."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions, OwnOptions):
    """What to browse, where to serve it, and the model of the pages that need one."""

    model: str | None = None
    """Language model for the pages that need one: smollm2, a hub id or a local folder; `none` for no model. By default
    the model recorded in the run, if it is smollm2 or lies inside the folder."""


def main(args: Sequence[str]) -> None:
    """Replace this process by the server, so that stopping one stops the other."""
    options = parse(
        Options, "app", args, "Serve the web app on a folder of runs: browse latents, explain prompts, steer."
    )
    if options.folder is None:
        options = dataclasses.replace(options, folder=default_folder())
    command, environment = prepare(options)
    console.print(f"saelab app on {options.folder}: http://127.0.0.1:{options.port}", markup=False)
    if os.name == "posix":
        os.execve(command[0], command, environment)
    sys.exit(subprocess.call(command, env=environment))


def prepare(options: Options) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment; UserError where the folder does not exist."""
    if options.folder is None or not options.folder.is_dir():
        raise UserError(
            f"{options.folder} is not a folder; name the one that holds your runs, or run `saelab demo` first"
        )
    if not 0 < options.port < 1 << 16:
        raise UserError(f"port {options.port} is no TCP port; give one from 1024 to 65535")
    if importlib.util.find_spec("streamlit") is None:
        raise UserError("the app needs streamlit; install it with: pip install 'saelab[app]'")
    command = [
        *(sys.executable, "-m", "streamlit", "run", str(shipped.app_script())),
        "--server.address=127.0.0.1",
        f"--server.port={options.port}",
        f"--server.headless={'false' if options.browser else 'true'}",
        "--server.fileWatcherType=none",
        "--server.showEmailPrompt=false",
        "--browser.gatherUsageStats=false",
    ]
    environment = {**os.environ, "SAELAB_APP_FOLDER": str(options.folder.resolve())}
    environment.pop("SAELAB_APP_MODEL", None)
    loading = {f.name: getattr(options, f.name) for f in dataclasses.fields(ModelOptions) if f.name != "model"}
    environment["SAELAB_APP_LOADING"] = json.dumps(loading)
    if options.model:
        environment["SAELAB_APP_MODEL"] = options.model
    return command, environment


def default_folder() -> Path:
    """The folder of the demonstration if it exists, else the shipped SAEs."""
    return DEMO if DEMO.is_dir() else shipped.checkpoints()
