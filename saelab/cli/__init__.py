"""The ``saelab`` command line. Each subcommand is a module of ``saelab.cli.commands``, imported when it is called."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console

from saelab._version import __version__
from saelab.errors import UserError, first_line, near_matches

# In the order a user works: what a group is for -> command -> what it does, in one line. The code of a command is
# `main(args)` in the module of that name in saelab.cli.commands, - written as _.
GROUPS = {
    "start": {
        "demo": "do everything once: text, language model, cache, SAE, metrics, feature index",
    },
    "activations": {
        "harvest": "cache a language model's activations",
        "cache": "describe, verify, merge and import activation caches",
    },
    "training": {
        "train": "train one SAE on an activation cache",
        "sweep": "train a grid of SAEs while reading the cache once",
    },
    "what was learned": {
        "evaluate": "measure an SAE on held-out activations and in the language model",
        "l0": "say which number of active latents fits, from SAEs trained with several",
        "index": "describe every latent of an SAE over a corpus",
        "explain": "describe latents with a language model, and score the descriptions",
        "map": "lay out all latents in the plane by their decoder directions, for the app",
        "find": "find latents by words, by a number, or by a marked text, in one SAE or several",
        "labels": "import labels of a public SAE's latents from Neuronpedia's export",
    },
    "use": {
        "app": "browse latents, explain prompts and steer in the web app",
        "attribute": "find out which latents caused a token, and which fed which",
        "steer": "continue prompts while latents or vectors are added, clamped or removed",
        "steer-eval": "compare ways of steering by the answers they give, with prompting beside them",
        "serve": "answer any chat client with a steered model, over OpenAI's protocol",
    },
    "exchange": {
        "inspect": "print what an SAE file of any tool contains",
        "convert": "convert an SAE between tools, and prove that both compute the same",
        "card": "write a run's model card: what it is, its metrics, how to load it",
    },
    "more": {
        "reproduce": "test the headline claims of a paper, with a verdict for each",
        "plan": "estimate memory and time of a large SAE on many GPUs",
        "info": "print versions, devices and the kernel backend in use",
    },
}
COMMANDS = {name: summary for commands in GROUPS.values() for name, summary in commands.items()}

# Remedies for operating-system errors.
_FULL = "free some space or write to another disk, then run the command again"
_FORBIDDEN = "choose a folder that you may write to"
_UNREACHED = "check the connection and the address, then run the command again"
_BROKEN = "check the disk or the network share, then run the command again"
_FILES = "raise the number of files a process may open (ulimit -n), then run the command again"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys((errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH), _UNREACHED),
    **dict.fromkeys((errno.ETIMEDOUT, errno.ECONNABORTED), _UNREACHED),
    **dict.fromkeys((errno.EIO, errno.ESTALE), _BROKEN),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FILES),
    errno.ENOENT: "check the path; another program may have removed it",
    errno.EEXIST: "choose another name, or remove it first",
    errno.ENOTDIR: "a part of the path is a file; choose another",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOMEM: "use smaller batches or another machine",
}
_ELSE = "fix this, then run the command again"


def main(args: Sequence[str] | None = None) -> None:
    """Run one command. Exits with code 2 and a line on stderr for invalid input and for operating-system errors."""
    args = list(sys.argv[1:] if args is None else args)
    with orderly():
        _dispatch(args)


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """A command runs in this block: what it raises for invalid input ends the process with one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A console may lack the letters of a model's text: they are written as \\u0142 instead of ending the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:  # `saelab ... | head`: the reader closed the pipe, which is not an error
        sys.exit(141)
    except (UserError, OSError) as error:
        report(error)
        if type(error).__name__ == "LostProcess":  # of saelab.distributed, which other commands do not import
            sys.stdout.flush()
            os._exit(2)  # without waiting for what is under way with the other processes
        sys.exit(2)
    except RuntimeError as error:  # torch, whose class this is, is imported by the commands that need it
        if type(error).__name__ != "OutOfMemoryError":
            raise
        report(UserError(f"{first_line(error)}; use smaller batches or passes, fewer latents, or another device"))
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True, highlight=False).print("interrupted")
        sys.exit(130)


def report(error: UserError | OSError) -> None:
    """Print the error on stderr, in one line; of several processes with the same error one prints it."""
    text = _reason(error) if isinstance(error, OSError) else str(error)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from saelab.distributed.failures import LostProcess, says_error

        if not says_error(text, isinstance(error, LostProcess)):
            return
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
    command = importlib.import_module(f"saelab.cli.commands.{name.replace('-', '_')}").main
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from saelab.distributed.failures import naming_lost

        with naming_lost():
            command(rest)
    else:
        command(rest)
    # Runs behind URLs were read, and results written, in local copies.
    if (copies := sys.modules.get("saelab.copies")) is not None:
        for url in copies.carry_all():
            Console(stderr=True, highlight=False).print(f"carried to {url}", markup=False, soft_wrap=True)


def _overview() -> None:
    console = Console(highlight=False)
    console.print("usage: saelab COMMAND [options]", markup=False)
    for group, commands in GROUPS.items():
        console.print(f"\n{group}:")
        for name, summary in commands.items():
            console.print(f"  [bold]{name:<10}[/] {summary}", soft_wrap=True)
    console.print("\nsaelab COMMAND --help lists the options of a command with units and defaults.")


def _reason(error: OSError) -> str:
    """An operating-system error in one line: the file, what happened, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or first_line(error)}; {REMEDIES.get(error.errno or 0, _ELSE)}"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
