"""Logs of training metrics: ``metrics.jsonl`` always, TensorBoard and wandb on request."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Protocol

from saelab.errors import UserError, damaged
from saelab.files import write_json
from saelab.layout import METRICS, TENSORBOARD, WANDB


class Log(Protocol):
    """A log that takes one record per step."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """``metrics.jsonl``: one JSON object per step, flushed line by line.

    It holds nothing that depends on the clock, so that a resumed run writes the very bytes of an uninterrupted one.
    Opened at a ``step``, it drops what an interrupted run had logged after that step, and a half-written last line.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        path = folder / METRICS
        kept = 0
        if step and path.exists():
            with damaged(path, "start the run again with --overwrite"), path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                    kept += len(line)
        self.file = path.open("r+" if kept else "w", buffering=1, encoding="utf-8")
        self.file.truncate(kept)
        self.file.seek(kept)

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.file.close()


def recent_fvu(folder: Path, step: int, total: int) -> float:
    """Mean training FVU over the last twentieth of the run up to ``step``, read from the run's own log."""
    window = max(1, total // 20)
    values = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if step - window < row["step"] <= step:
            values.append(row["fvu"])
    return math.fsum(values) / len(values)


class TensorBoard:
    """Scalars for TensorBoard under ``folder/tensorboard``; needs the extra ``saelab[tensorboard]``."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs `pip install saelab[tensorboard]`") from error
        self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(f"train/{name}", value, row["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A wandb run named after the folder; needs the extra ``saelab[wandb]``.

    Its id is stored in the folder, so that a resumed run continues it, even if the folder was moved.
    """

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs `pip install saelab[wandb]`") from error
        name = folder.resolve().name
        self.run = wandb.init(
            project=project, name=name, id=_wandb_id(folder, project), config=config, dir=str(folder), resume="allow"
        )

    def write(self, row: dict[str, Any]) -> None:
        self.run.log({f"train/{name}": value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        self.run.finish()


def _wandb_id(folder: Path, project: str) -> str:
    """The run's id in wandb: the one kept in the folder, or a new one, which no other folder gets."""
    path, whole = folder / WANDB, folder.resolve()
    if path.is_file():
        with damaged(path, "remove it"):
            return str(json.loads(path.read_bytes())["id"])
    found = f"{whole.name}-{hashlib.sha256(str(whole).encode()).hexdigest()[:12]}"
    if (folder / "wandb").is_dir():  # begun by saelab 0.1.0, which wrote no file
        found = f"{project}-{whole.name}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"id": found})
    return found
