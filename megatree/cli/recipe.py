"""RECIPE on the command line: a name, or a saved config.json, as the default of all options."""

from megatree.cli.choose import choose
from megatree.recipes.config import RunConfig
from megatree.recipes.presets import RECIPES
from megatree.recipes.saved import load_config


def read_recipe(prog: str, args: list[str], *, about: str) -> RunConfig:
    """Return the config that the first argument names.

    Raises:
        ValueError: it names none.
        SystemExit: after help.
    """
    if args and args[0].endswith(".json"):
        return load_config(args[0])
    described = {name: description(name) for name in RECIPES}
    about = f"{about} A recipe may also be the config.json of a run."
    return RECIPES[choose(prog, args, described, kind="recipe", about=about)]()


def description(name: str) -> str:
    """Return the first line of a recipe's docstring, as a label."""
    text = (RECIPES[name].__doc__ or "").partition("\n")[0].removeprefix("Return ").rstrip(".")
    return f"{text[0].upper()}{text[1:]}."
