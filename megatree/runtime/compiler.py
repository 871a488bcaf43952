"""What torch.compile needs of a machine: a compiler for what it writes, looked for before a run."""

import os
import shutil
import sys
from collections.abc import Mapping


def check_compiler(device: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse compiled mode where the code that it writes cannot be built.

    On a CPU inductor writes C++, and takes $CXX, else g++ (clang++ on macOS). On a GPU it writes
    Triton, which builds its launchers in C by $CC, else by gcc or clang.

    Args:
        device: type of the device, "cpu" or "cuda".
        environ: of the process.

    Raises:
        ValueError: there is none.
    """
    if device == "cuda":
        kind, variable, names = "C", "CC", ("gcc", "clang")
    else:
        kind, variable = "C++", "CXX"
        names = ("clang++",) if sys.platform == "darwin" else ("g++",)
    asked = environ.get(variable)
    # A variable may hold options beside the name.
    wanted = (asked.split()[0],) if asked and asked.split() else names
    path = environ.get("PATH", "")
    if any(shutil.which(name, path=path) for name in wanted):
        return
    if asked:
        what = f"${variable} names {asked!r}, which is not on the PATH"
    else:
        what = f"no {kind} compiler ({' or '.join(names)}, or ${variable}) is on the PATH"
    other = f", or set {variable}=clang++" if "g++" in names and _has("clang++", path) else ""
    raise ValueError(
        f"compile: torch.compile builds {kind} on {device}, and {what}. "
        f"Install {names[0]}{other}, or set compile to False."
    )


def _has(name: str, path: str) -> bool:
    return shutil.which(name, path=path) is not None
