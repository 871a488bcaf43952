"""Where in the user's program an op was written."""

import sys
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_TORCH = str(Path(torch.__file__).parent)
_INSIDE = tuple(str(_PACKAGE / part) for part in ("functional", "parallel", "runtime"))


def user_line() -> str:
    """Return "file.py:12" of the innermost frame outside the engine, the vocabulary and torch."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_INSIDE) and not name.startswith(_TORCH) and name[0] != "<":
            return f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def inside_autograd_function() -> bool:
    """Whether a `torch.autograd.Function.apply` is on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("torch/autograd/function.py"):
            return True
        frame = frame.f_back
    return False
