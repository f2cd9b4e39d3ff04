"""The repository and the path in it that a file on this machine was downloaded from, as far as names show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from saelab.errors import damaged
from saelab.files import write_json
from saelab.layout import SOURCE

CACHED = "models--"  # huggingface_hub keeps org/repo in models--org--repo/snapshots/REVISION
LEVELS = 5  # names above the file that can belong to a collection; those further up are the user's own folders


class Origin(NamedTuple):
    """Where a file comes from.

    Attributes:
        repository: Name of the repository without its owner; of a plain folder the outermost name that counts.
        inside: Path in the repository, with ``/``.
        certain: Whether the path is one of the hub's cache, so that ``repository`` is one.
    """

    repository: str
    inside: str
    certain: bool = False

    @classmethod
    def of(cls, path: Path) -> Origin:
        """The origin of a file or folder. Links are not followed: the hub's cache has the names on the links."""
        note = (path if path.is_dir() else path.parent) / SOURCE
        if note.is_file():
            return cls._read(note)
        parts = path.absolute().parts
        for number in range(len(parts) - 1, -1, -1):
            if parts[number].startswith(CACHED) and parts[number + 1 : number + 2] == ("snapshots",):
                return cls(parts[number].split("--")[-1], "/".join(parts[number + 3 :]), True)
        names = parts[-LEVELS:]
        return cls(names[0], "/".join(names[1:]))

    @classmethod
    def _read(cls, note: Path) -> Origin:
        with damaged(note, "delete it, or copy the SAE again"):
            content = json.loads(note.read_bytes())
            return cls(str(content["repository"]), str(content["inside"]), bool(content["certain"]))

    def write(self, folder: Path) -> None:
        """Keep the origin with a copy of the files in ``folder``, whose own name may say nothing."""
        write_json(folder / SOURCE, self._asdict())

    def splits(self) -> list[tuple[str, str]]:
        """Every way to read it as a repository and a path inside, the deepest repository first."""
        if self.certain:
            return [(self.repository, self.inside)]
        names = [self.repository, *self.inside.split("/")]
        return [(names[i], "/".join(names[i + 1 :])) for i in range(len(names) - 1, -1, -1)]
