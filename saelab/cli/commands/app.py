"""``saelab app``: the feature browser on a folder of runs, for this machine only unless other machines are let in."""

from __future__ import annotations

import dataclasses
import getpass
import importlib.util
import ipaddress
import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from saelab import shipped
from saelab.cli.console import console, parse
from saelab.cli.models import ModelOptions
from saelab.copies import pull_tree
from saelab.devices import pick_device
from saelab.errors import UserError
from saelab.features.explanations import ChatClient
from saelab.files import url_of

DEMO = Path("demo")
REFRESH = 60.0  # seconds between two looks at a store
TOKEN, EXPLAIN = "SAELAB_APP_TOKEN", "SAELAB_APP_EXPLAIN"


@dataclasses.dataclass(frozen=True)
class OwnOptions:
    """What to browse, and where to serve it."""

    folder: tyro.conf.Positional[Path | None] = None
    """Folder that holds runs and caches, at any depth; nothing outside it is opened. A URL (s3://bucket/runs) is shown
    read-only from a local copy. By default `demo`, or the trained
    SAEs that come with saelab if there is no such folder."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own asks visitors for a token, which is printed; an app on a
    distant machine is better reached through ssh, which encrypts."""
    port: int = 8501
    """TCP port."""
    browser: bool = True
    """Open the page in the default browser."""
    read_only: bool = False
    """Write nothing into the folder: no notes, labels, recipes, explanations or indexes."""
    explain_endpoint: str | None = None
    """Address of an OpenAI-compatible server up to /v1: a latent's page then has a button that asks it for a
    description. Its key is taken from the environment variable OPENAI_API_KEY."""
    explain_model: str | None = None
    """Model that describes, as the server calls it."""


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
    if (url := url_of(options.folder or "")) is not None:
        options = dataclasses.replace(options, folder=pull_tree(url), read_only=True)
        console.print(f"{url} is shown read-only, from a copy that is refreshed every minute", soft_wrap=True)
    command, environment = prepare(options)
    for line in addresses(options, environment.get(TOKEN)):
        console.print(line, markup=False, soft_wrap=True)
    if url is not None:
        sys.exit(serve_copy(url, command, environment))
    if os.name == "posix":
        os.execve(command[0], command, environment)
    sys.exit(subprocess.call(command, env=environment))


def serve_copy(url: str, command: list[str], environment: dict[str, str]) -> int:
    """Serve the copy of a URL, and keep it as the store is; returns the server's exit code."""
    server = subprocess.Popen(command, env=environment)
    try:
        while True:
            try:
                return server.wait(REFRESH)
            except subprocess.TimeoutExpired:
                pass
            try:
                pull_tree(url)
            except (OSError, UserError) as error:
                console.print(f"the copy stays as it is: {error}", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        return server.wait()
    finally:
        if server.poll() is None:
            server.terminate()


def prepare(options: Options) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment; UserError where the folder does not exist."""
    if options.folder is None or not options.folder.is_dir():
        raise UserError(
            f"{options.folder} is not a folder; name the one that holds your runs, or run `saelab demo` first"
        )
    if not 0 < options.port < 1 << 16:
        raise UserError(f"port {options.port} is no TCP port; give one from 1024 to 65535")
    pick_device(options.device)  # refused here, before a page needs the model
    if importlib.util.find_spec("streamlit") is None:
        raise UserError("the app needs streamlit; install it with: pip install 'saelab[app]'")
    open_to_others = not is_loopback(options.host)
    script = shipped.app_script()
    command = [
        *(sys.executable, "-m", "streamlit", "run"),
        str(script.with_name("guarded_app.py") if open_to_others else script),
        f"--server.address={options.host}",
        f"--server.port={options.port}",
        f"--server.headless={'false' if options.browser and not open_to_others and not over_ssh() else 'true'}",
        "--server.fileWatcherType=none",
        "--server.showEmailPrompt=false",
        "--browser.gatherUsageStats=false",
        "--logger.hideWelcomeMessage=true",  # and the offer to install something for assistants, on the page as well
    ]
    environment = {**os.environ, "SAELAB_APP_FOLDER": str(options.folder.resolve())}
    for name in ("SAELAB_APP_MODEL", "SAELAB_APP_READ_ONLY", TOKEN):
        environment.pop(name, None)
    if open_to_others:
        environment[TOKEN] = token()  # not on the command line, which every user of the machine can read
    if options.read_only:
        environment["SAELAB_APP_READ_ONLY"] = "1"
    loading = {f.name: getattr(options, f.name) for f in dataclasses.fields(ModelOptions) if f.name != "model"}
    if (options.explain_endpoint is None) != (options.explain_model is None):
        raise UserError("--explain-endpoint and --explain-model belong together; give both or neither")
    environment.pop(EXPLAIN, None)
    if options.explain_endpoint and options.explain_model:
        ChatClient(options.explain_endpoint, options.explain_model)  # refuses what is no address
        environment[EXPLAIN] = json.dumps({"base_url": options.explain_endpoint, "model": options.explain_model})
    environment["SAELAB_APP_LOADING"] = json.dumps(loading)
    if options.model:
        environment["SAELAB_APP_MODEL"] = options.model
    return command, environment


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone. UserError for what is no address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UserError(
            f"--host {host} is no IP address; give 127.0.0.1 for this machine alone, or 0.0.0.0 to let others in"
        ) from None


def token() -> str:
    """What visitors from other machines must show: new for each start, unless the environment has one."""
    given = os.environ.get(TOKEN)
    if given is None:
        return secrets.token_urlsafe(24)
    if not re.fullmatch(r"[\w-]{16,}", given, re.ASCII):
        raise UserError(f"{TOKEN} must be 16 or more letters, digits, - or _; unset it to get a new one at each start")
    return given


def over_ssh() -> bool:
    """Whether this terminal belongs to somebody at another machine."""
    return bool(os.environ.get("SSH_CONNECTION"))


def addresses(options: Options, secret: str | None) -> list[str]:
    """What to open in a browser, here or at the other end of an ssh connection."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    here = f"http://{host}:{options.port}"
    if secret is not None:
        named = f"http://{socket.gethostname()}:{options.port}" if options.host in ("0.0.0.0", "::") else here
        return [
            f"saelab app on {options.folder}: {named}/?token={secret}",
            "The token stays in a cookie. The connection is not encrypted: use it in a network that you trust.",
        ]
    lines = [f"saelab app on {options.folder}: {here}"]
    if over_ssh():
        server = os.environ["SSH_CONNECTION"].split()[2:3] or ["HOST"]
        tunnel = f"ssh -L {options.port}:{host}:{options.port} {getpass.getuser()}@{server[0]}"
        lines.append(f"From your own machine: {tunnel}, then open http://127.0.0.1:{options.port} there.")
    return lines


def default_folder() -> Path:
    """The folder of the demonstration if it exists, else the shipped SAEs."""
    return DEMO if DEMO.is_dir() else shipped.checkpoints()
