"""Scripted users of a running app, without browsers: ``python tests/app/users.py FOLDER --users 20 --minutes 5``.

Each user speaks the app's own protocol over a web socket: opens pages in random order, searches, follows links to
latents, reads prompts, steers, and now and then closes the tab and comes back. Printed at the end: pages served, the
time they took, every error that a page showed, and the server's memory over the second half of the time.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

ROOT = Path(__file__).parents[2]
WORDS = ("river", "the", "mill", "war", "<script>", "in", "[a](b)", "")
ERROR_BOX = 1  # proto/Alert: Format.ERROR


@dataclass
class Findings:
    """What all users saw; lists are appended to from many threads."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds since the start, MB

    def growth(self) -> float:
        """MB by which the median of the last fifth of the time exceeds that of the fifth after the first half."""
        end = self.memory[-1][0]
        fifths = [
            statistics.median(mb for at, mb in self.memory if low * end <= at <= high * end)
            for low, high in ((0.5, 0.7), (0.8, 1.0))
        ]
        return fifths[1] - fifths[0]

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        return {
            "pages": len(ordered),
            "median_seconds": round(statistics.median(ordered), 3),
            "95_percent_seconds": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
            "errors": self.errors,
            "memory_MB": [round(self.memory[i * (len(self.memory) - 1) // 10][1]) for i in range(11)],
            "growth_MB": round(self.growth(), 1),
        }


class User:
    """One browser tab."""

    def __init__(self, port: int, seed: int, runs: list[str], d_sae: int, model: bool) -> None:
        self.port, self.runs, self.d_sae, self.model = port, runs, d_sae, model
        self.rng = random.Random(seed)
        self.pages: dict[str, str] = {}
        self.widgets: dict[str, str] = {}  # key -> id on the page that was drawn last
        self.socket: ClientConnection | None = None
        self._open = ExitStack()

    def open(self) -> None:
        """Open the tab, as a fresh session."""
        self.close()
        address = f"ws://127.0.0.1:{self.port}/_stcore/stream"
        socket = connect(address, subprotocols=[Subprotocol("streamlit")], max_size=None, open_timeout=120)
        self.socket = self._open.enter_context(socket)

    def close(self) -> None:
        self._open.close()
        self.socket = None

    def draw(self, page: str, query: str = "", **values: Any) -> list[str]:
        """Draw a page with these widgets (by key) changed; returns what went wrong on it."""
        message = BackMsg()
        state = message.rerun_script
        state.query_string, state.page_script_hash = query, self.pages.get(page, "")
        for key, value in values.items():
            found = [name for name in self.widgets if name.endswith(f"-{key}")]
            if not found:
                return [f"{page}: no widget {key}"]
            widget = state.widget_states.widgets.add(id=found[0])
            if value is True:
                widget.trigger_value = True
            elif isinstance(value, str):
                widget.string_value = value
            else:
                widget.double_value = value
        assert self.socket is not None
        self.socket.send(message.SerializeToString())
        self.widgets = {} if not values else self.widgets
        return [f"{page}?{query}: {problem}" for problem in self._problems()]

    def _problems(self) -> Iterator[str]:
        """What a page shows as errors, until it is drawn."""
        assert self.socket is not None
        while True:
            said = ForwardMsg()
            said.ParseFromString(self.socket.recv(timeout=300))
            kind = said.WhichOneof("type")
            if kind == "navigation":
                self.pages = {page.url_pathname: page.page_script_hash for page in said.navigation.app_pages}
            elif kind == "delta" and said.delta.WhichOneof("type") == "new_element":
                yield from self._element(said.delta.new_element)
            elif kind == "script_finished":
                status = ForwardMsg.ScriptFinishedStatus.Name(said.script_finished)
                if status == "FINISHED_WITH_COMPILE_ERROR":
                    yield status
                if status != "FINISHED_EARLY_FOR_RERUN":
                    return

    def _element(self, element: Any) -> Iterator[str]:
        kind = element.WhichOneof("type")
        if kind == "exception":
            yield f"{element.exception.type}: {element.exception.message}"
        elif kind == "alert" and element.alert.format == ERROR_BOX:
            yield element.alert.body
        identity = getattr(getattr(element, kind or "", None), "id", "")
        if identity:
            self.widgets[identity] = identity

    def visit(self) -> list[str]:
        """Do one thing that a researcher does."""
        run = f"run={self.rng.choice(self.runs)}"
        deeds = ["", "training", "features", "search", "latent", "latent", "latent", "health", "compare"]
        deed = self.rng.choice([*deeds, *(["prompt", "steering"] if self.model else [])])
        if deed == "search":
            return self.draw("features", run) + self.draw("features", run, q=self.rng.choice(WORDS))
        if deed == "latent":
            return self.draw("latent", f"{run}&latent={self.rng.randrange(self.d_sae)}&pole=1")
        if deed == "prompt":
            drawn = self.draw("prompt", run)
            text, button = self.rng.choice(WORDS) + " river runs past", {"FormSubmitter:prompt_form-Read": True}
            return drawn + self.draw("prompt", run, prompt_text=text, **button)
        if deed == "steering":
            drawn = self.draw("steering", run) + self.draw(
                "steering", run, **{"FormSubmitter:steering_latent-Add": True}
            )
            button = {"FormSubmitter:steering_form-Generate": True}
            return drawn + self.draw("steering", run, steering_length=5.0, **button)
        if deed == "compare":
            return self.draw("compare", run) + self.draw("compare", run, compare_go=True)
        return self.draw(deed, run)

    def live(self, until: float, found: Findings) -> None:
        """Visit pages until then, two at least; every dozenth time close the tab and open another."""
        visits = 0
        while visits < 2 or time.monotonic() < until:
            started = time.monotonic()
            try:
                if visits % 12 == 0:
                    self.open()
                    found.errors += self.draw("")
                visits += 1
                found.errors += self.visit()
            except Exception as error:  # whatever breaks a user's session is a finding
                found.errors.append(f"{type(error).__name__}: {error}")
                self.close()
                return
            found.seconds.append(time.monotonic() - started)
        self.close()


def crowd(port: int, pid: int, users: int, minutes: float, runs: list[str], d_sae: int, model: bool) -> Findings:
    """All users at once, and a look at the server's memory four times a second."""
    found, started = Findings(), time.monotonic()
    until = started + 60 * minutes
    people = [User(port, seed, runs, d_sae, model) for seed in range(users)]
    threads = [threading.Thread(target=user.live, args=(until, found)) for user in people]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found.memory.append((time.monotonic() - started, resident(pid)))
        time.sleep(0.25)
    return found


def resident(pid: int) -> float:
    """Memory of a process that is its own, in MB: pages of mapped files belong to the system."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("the kernel does not tell a process's memory")


@contextmanager
def serve(folder: Path, model: str | None = None) -> Iterator[tuple[int, int]]:
    """The app as a user starts it, on a free port: (port, process id)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "saelab", "app", str(folder), "--port", str(port), "--no-browser"]
    command += ["--model", model] if model else []
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/_stcore/health")
        yield port, server.pid
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:  # on a machine with much else to do
            server.kill()
            server.wait()


def wait_for(url: str, seconds: float = 60.0) -> None:
    """Until the address answers."""
    for _ in range(int(seconds / 0.2)):
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(url)


def main() -> None:
    """Parse, run, print."""
    from saelab.workspace import Workspace

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--model", help='as in "saelab app"; by default the one the runs name')
    options = parser.parse_args()
    runs = [run for run in Workspace.scan(options.folder).runs.values() if run.has_index]
    d_sae = min(run.d_sae or 1 for run in runs)
    with serve(options.folder, options.model) as (port, pid):
        names = [run.name for run in runs]
        found = crowd(port, pid, options.users, options.minutes, names, d_sae, options.model != "none")
    sys.stdout.write(json.dumps(found.summary(), indent=1) + "\n")


if __name__ == "__main__":
    main()
