"""Find the command, run it, and say in one sentence what a user has to mend."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from megatree.cli.choose import choose
from megatree.runtime.refusals import refusal

USER_ERROR = 2
"""Exit code of a refusal, as of a wrong option."""

ABOUT = "Train large transformers in parallel: models are pure functions, layouts are data."

COMMANDS: Mapping[str, str] = {
    "train": "Train a recipe, or go on with one.",
    "generate": "Continue a text with a trained model.",
    "explain": "Print what a rank runs: the program of one block, its collectives.",
    "plan": "Plan a run before it runs: memory, collectives, time.",
    "convert": "Convert a checkpoint between formats.",
    "inspect": "Print what is in a checkpoint, or how two differ.",
    "verify": "Read a checkpoint whole and compare its checksums.",
    "data": "Turn text into token files, and look into them.",
    "corpus": "Clean, deduplicate and decontaminate text.",
    "demo": "Train, change the mesh and generate, in minutes on two CPU cores.",
}
"""Command, which is also the module whose `main(args)` runs it -> what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `megatree` with these arguments; return the exit code.

    A refusal is one message on stderr and code 2; the failure of a rank, its traceback and code 1.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has left; the interpreter's last flush must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        told = getattr(error, "refusal", None) or refusal(error)
        if told is not None:
            return _say(told, USER_ERROR)
        if type(error).__name__ == "RankFailed":  # imported by name: its module imports torch
            return _say(str(error), 1)
        raise


def _run(args: list[str]) -> int:
    if args == ["--version"]:
        return _version()
    flags = {"version": "print the version and exit"}
    name = choose("megatree", args, COMMANDS, kind="command", about=ABOUT, flags=flags)
    # Only now: `megatree --help` needs no torch.
    return importlib.import_module(f"megatree.cli.{name}").main(args[1:])


def _version() -> int:
    from importlib.metadata import version

    from megatree import __version__

    print(f"megatree {__version__} (torch {version('torch')}, Python {sys.version.split()[0]})")
    return 0


def _say(text: str, code: int) -> int:
    sys.stdout.flush()
    rank = os.environ.get("RANK", "")
    place = f" (rank {rank})" if rank else ""
    print(f"megatree{place}: {text}", file=sys.stderr)
    return code
