"""The first word of a command line: one of a few names, with help for who does not know them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, Union

import tyro

from megatree.recipes.words import did_you_mean


@dataclass(frozen=True)
class _Chosen:
    """Stands for what a name leads to."""


def choose(
    prog: str,
    args: list[str],
    names: Mapping[str, str],
    *,
    kind: str,
    about: str,
    flags: Mapping[str, str] | None = None,
) -> str:
    """Return the first of the arguments if it is one of the names; print help if that is asked.

    Args:
        prog: what was typed before.
        args: the arguments.
        names: name -> what it does, in a line.
        kind: what the names are ("command").
        about: what `prog` does.
        flags: further options for the help: name -> what it does.

    Raises:
        ValueError: it is no such name.
        SystemExit: after help, which is also the answer to no arguments.
    """
    if not args or args[0] in ("-h", "--help"):
        _print_help(prog, names, kind, about, flags or {})
        raise SystemExit(0 if args else 2)
    if args[0] in names:
        return args[0]
    if args[0].startswith("-"):
        raise ValueError(
            f"{args[0]}: comes before the {kind}. Type {prog} {kind.upper()} {args[0]} ..., with "
            f"one of {', '.join(names)}."
        )
    raise ValueError(
        f"{args[0]}: no {kind} is called so{did_you_mean(args[0], names)}. "
        f"Use one of {', '.join(names)}."
    )


def _print_help(
    prog: str, names: Mapping[str, str], kind: str, about: str, flags: Mapping[str, str]
) -> None:
    links: Any = tuple(
        Annotated[_Chosen, tyro.conf.subcommand(name=name, description=text)]
        for name, text in names.items()
    )
    fields: list[Any] = [(kind, Annotated[Union[links], tyro.conf.arg(help=f"A {kind}:")])]  # noqa: UP007
    for name, text in flags.items():
        fields.append((name, Annotated[bool, tyro.conf.arg(help=text)], field(default=False)))
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    with suppress(SystemExit):
        made = make_dataclass("Names", fields)
        tyro.cli(made, prog=prog, description=about, args=["--help"], config=config)
