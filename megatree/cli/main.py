"""Find the command, run it, and say in one sentence what a user has to mend."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from megatree.cli.choose import choose
from megatree.runtime.refusals import refusal

USER_ERROR = 2
"""Exit code of a refusal, as of a wrong option."""


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
    described = {name: text for name, (text, _) in COMMANDS.items()}
    flags = {"version": "print the version and exit"}
    name = choose("megatree", args, described, kind="command", about=ABOUT, flags=flags)
    return COMMANDS[name][1](args[1:])


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


# Each command is imported when it runs: `megatree --help` needs no torch.


def _train(args: list[str]) -> int:
    from megatree.cli.train import main

    return main(args)


def _explain(args: list[str]) -> int:
    from megatree.cli.explain import main

    return main(args)


def _generate(args: list[str]) -> int:
    from megatree.cli.generate import main

    return main(args)


def _demo(args: list[str]) -> int:
    from megatree.cli.demo import main

    return main(args)


ABOUT = "Train large transformers in parallel: models are pure functions, layouts are data."
COMMANDS: Mapping[str, tuple[str, Callable[[list[str]], int]]] = {
    "train": ("Train a recipe, or go on with one.", _train),
    "generate": ("Continue a text with a trained model.", _generate),
    "explain": ("Print what a rank runs: the program of one block, its collectives.", _explain),
    "demo": ("Train, change the mesh and generate, in minutes on two CPU cores.", _demo),
}
