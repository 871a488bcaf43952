"""RECIPE on the command line: a name, or a saved config.json, as the default of all options."""

from megatree.cli.choose import choose
from megatree.recipes.config import RunConfig
from megatree.recipes.layout_file import with_layout
from megatree.recipes.presets import RECIPES
from megatree.recipes.saved import load_config


def read_recipe(prog: str, args: list[str], *, about: str) -> RunConfig:
    """Return the config that the first argument names, under the layout of `--layout FILE`.

    Other options are read later, with this config as their default.

    Raises:
        ValueError: it names none, or the layout is not one of it.
        SystemExit: after help.
    """
    if args and args[0].endswith(".json"):
        cfg = load_config(args[0])
    else:
        described = {name: description(name) for name in RECIPES}
        about = f"{about} A recipe may also be the config.json of a run."
        cfg = RECIPES[choose(prog, args, described, kind="recipe", about=about)]()
    path = _value_of("--layout", args[1:])
    return with_layout(cfg, path) if path else cfg


def _value_of(flag: str, args: list[str]) -> str:
    """Return the last value of an option, "" if it is not given."""
    value = ""
    for at, arg in enumerate(args):
        if arg == flag:
            value = args[at + 1] if at + 1 < len(args) else ""
        elif arg.startswith(f"{flag}="):
            value = arg.removeprefix(f"{flag}=")
    return value


def description(name: str) -> str:
    """Return the first line of a recipe's docstring, as a label."""
    text = (RECIPES[name].__doc__ or "").partition("\n")[0].removeprefix("Return ").rstrip(".")
    return f"{text[0].upper()}{text[1:]}."
