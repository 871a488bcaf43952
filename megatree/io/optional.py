"""Import an optional dependency, or say which extra of megatree brings it."""

import importlib
from types import ModuleType


def optional(name: str, *, extra: str, purpose: str) -> ModuleType:
    """Return the module `name`; the packages of an extra are loaded at first use only.

    Args:
        name: dotted name of the module.
        extra: the extra of megatree that installs it.
        purpose: what needs it, the start of the error.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{purpose}: the package '{name}' is not installed. "
            f"Install it: pip install 'megatree[{extra}]'."
        ) from error
