"""The ``saelab`` command: one file per subcommand, imported only when it is called."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence

from rich.console import Console

from saelab._version import __version__
from saelab.errors import UserError, first_line, near_matches

# command -> what it does, in one line; its code is `main(args)` in the module of that name in saelab.cli.commands.
COMMANDS = {
    "demo": "text, language model, cache, SAE, metrics and feature index in one go",
    "harvest": "cache a language model's activations",
    "cache": "look at, check, join and import activation caches",
    "steer": "continue prompts with a latent turned up, clamped or removed, or with a recipe",
    "app": "browse latents, explain prompts and steer in the web app",
    "inspect": "say what an SAE checkpoint of any tool is",
    "convert": "turn an SAE of one tool into one of another, with proof",
    "card": "write a run's model card: what it is, its metrics, how to load it",
    "info": "versions, devices and the kernel backend in use",
    "train": "train one SAE on an activation cache",
    "sweep": "train a grid of SAEs from one reading of a cache",
    "index": "describe every latent of a run over a corpus",
    "plan": "estimate what a large SAE costs on many GPUs",
    "explain": "describe latents with a language model, and score the descriptions",
    "evaluate": "measure a run on held-out activations and in the language model",
    "reproduce": "run a paper's headline claims, with a verdict for each",
}

# What to do about what the system refuses to a command.
_FULL = "free some space or write to another disk, then run the command again"
_FORBIDDEN = "choose a folder that you may write to"
_UNREACHED = "check the connection and the address, then run the command again"
_BROKEN = "check the disk or the share that it lies on, then run the command again"
_FILES = "raise the number of files a process may open (ulimit -n), then run the command again"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys((errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH), _UNREACHED),
    **dict.fromkeys((errno.ETIMEDOUT, errno.ECONNABORTED), _UNREACHED),
    **dict.fromkeys((errno.EIO, errno.ESTALE), _BROKEN),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FILES),
    errno.ENOENT: "check the path, or whether something removed it meanwhile",
    errno.EEXIST: "choose another name, or remove it first",
    errno.ENOTDIR: "a part of the path is a file; choose another",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOMEM: "use smaller batches or another machine",
}
_ELSE = "mend that, then run the command again"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; leaves with 0, or 2 and one line when the user can mend something."""
    args = list(sys.argv[1:] if args is None else args)
    console = Console(stderr=True, highlight=False)
    try:
        _dispatch(args)
    except BrokenPipeError:  # `saelab ... | head`: nobody reads on, nothing is wrong
        sys.exit(141)
    except (UserError, OSError) as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)


def report(error: UserError | OSError) -> None:
    """Say on stderr, in one line, what is wrong."""
    text = _reason(error) if isinstance(error, OSError) else str(error)
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(text)}", soft_wrap=True)


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in {"-h", "--help"}:
        _overview()
        return
    if args[0] == "--version":
        Console().print(__version__, highlight=False)
        return
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: {near_matches(name, COMMANDS)}")
    importlib.import_module(f"saelab.cli.commands.{name}").main(rest)


def _overview() -> None:
    console = Console(highlight=False)
    console.print("usage: saelab COMMAND [options]\n\ncommands:")
    for name, summary in COMMANDS.items():
        console.print(f"  [bold]{name:<10}[/] {summary}")
    console.print("\nsaelab COMMAND --help lists a command's options with units and defaults.")


def _reason(error: OSError) -> str:
    """What the system refused, in one line: a full disk, a read-only folder, a file that went away; and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or first_line(error)}; {REMEDIES.get(error.errno or 0, _ELSE)}"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
