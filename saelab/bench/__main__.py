"""``python -m saelab.bench``: list the benchmarks, and what each compares."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from saelab.cli import orderly
from saelab.errors import UserError

NOT_ONE = {"command", "timing", "__init__", "__main__"}


def benchmarks() -> dict[str, str]:
    """The first sentence of every benchmark by its module; nothing is imported."""
    folder, found = Path(__file__).parent, {}
    for path in [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/__main__.py"))]:
        name = path.stem if path.parent == folder else path.parent.name
        if name not in NOT_ONE:
            says = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[f"saelab.bench.{name}"] = " ".join(says.split("\n\n")[0].split())
    return found


def main() -> None:
    """Print the list."""
    if sys.argv[1:]:
        raise UserError(f"{sys.argv[1]!r} is no option of saelab.bench; run python -m saelab.bench.NAME")
    for name, says in benchmarks().items():
        sys.stdout.write(f"python -m {name:<26} {says}\n")


if __name__ == "__main__":
    with orderly():
        main()
