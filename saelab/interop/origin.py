"""The repository and the path in it that a file on this machine was downloaded from, as far as names show it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
        parts = path.absolute().parts
        for number in range(len(parts) - 1, -1, -1):
            if parts[number].startswith(CACHED) and parts[number + 1 : number + 2] == ("snapshots",):
                return cls(parts[number].split("--")[-1], "/".join(parts[number + 3 :]), True)
        names = parts[-LEVELS:]
        return cls(names[0], "/".join(names[1:]))

    def splits(self) -> list[tuple[str, str]]:
        """Every way to read it as a repository and a path inside, the deepest repository first."""
        if self.certain:
            return [(self.repository, self.inside)]
        names = [self.repository, *self.inside.split("/")]
        return [(names[i], "/".join(names[i + 1 :])) for i in range(len(names) - 1, -1, -1)]
