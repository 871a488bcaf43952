"""What a rule is, and the torch functions that go by one name."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatree.parallel.typed import TypedTensor, map_structure

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer

Apply = Callable[["Tracer", str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Rule:
    """How a torch function is typed and emitted.

    Args:
        apply: called with (tracer, name, function, args, kwargs); returns the typed result.
        is_factory: whether the function makes a tensor from no tensor.
    """

    apply: Apply
    is_factory: bool = False


def functions(name: str) -> list[Callable[..., Any]]:
    """Return every torch function of a name: torch.add, Tensor.add, Tensor.__add__, ..."""
    spellings: Iterable[tuple[Any, str]] = (
        (torch, name),
        (F, name),
        (torch.special, name),
        (Tensor, name),
        (Tensor, f"__{name}__"),
    )
    found = [getattr(space, spelling, None) for space, spelling in spellings]
    return list(dict.fromkeys(f for f in found if callable(f)))


def table(names: Iterable[str], rule: Rule) -> dict[Callable[..., Any], Rule]:
    """Give one rule to every function of the names."""
    return {fn: rule for name in names for fn in functions(name)}


_ALIASES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x1": "input", "x2": "other"}


def canonical(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Spell arguments in torch's own words (its parser takes numpy's too), the input first."""
    kwargs = {_ALIASES.get(key, key): value for key, value in kwargs.items()}
    if not args and "input" in kwargs and "condition" not in kwargs:
        args = (kwargs.pop("input"),)
    return args, kwargs


def argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any = None
) -> Any:
    """Return an argument given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def plain_call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function on the meta tensors of the whole values, to learn shapes and dtypes."""

    def plain(a: Any) -> Any:
        return a.plain if isinstance(a, TypedTensor) else a

    args, kwargs = map_structure(plain, (args, kwargs))
    return func(*args, **kwargs)


def dims_of(x: Tensor, dim: Any) -> list[int]:
    """Return the non-negative dims that a `dim` argument names; all for None and ()."""
    if dim is None or dim == ():
        return list(range(x.dim()))
    return [d % max(x.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim)]
