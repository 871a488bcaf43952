"""`op`: declare a function on plain tensors as an op, with the signature from which it is
sharded.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.overrides import handle_torch_function, has_torch_function

from megatree.functional.comm import SINGLE

Text = str | Callable[[Sequence[int]], str] | Callable[[Sequence[int], Sequence[str]], str]


@dataclass(frozen=True, kw_only=True)
class OpRule:
    """How an op declared with `op` is typed and called.

    Args:
        name: the op's name in plans and errors.
        fn: the function on plain (local) tensors.
        signature: text of `signature.parse`, or a function of the operands' ranks (and, if it
            takes two arguments, of their names).
        linear: sets of operand positions in which the op is jointly linear.
        comm: whether `fn` takes a comm over the signature's labels as its first argument.
        product: whether the op is exactly the contraction that its labels spell.
        communicates: whether `fn` exchanges tensors over labels that it does not own.
        operands: names of the operands, in order.
    """

    name: str
    fn: Callable[..., Any]
    signature: Text
    linear: tuple[tuple[int, ...], ...] = ()
    comm: bool = False
    product: bool = False
    communicates: bool = False
    operands: tuple[str, ...] = ()

    def text(self, ranks: Sequence[int], names: Sequence[str]) -> str:
        """Return the signature for operands of these ranks and names (absent ones left out)."""
        if isinstance(self.signature, str):
            return self.signature
        made: Callable[..., str] = self.signature
        if len(inspect.signature(made).parameters) == 1:
            return made(ranks)
        return made(ranks, names)


def op(
    signature: Text,
    *,
    linear: Sequence[Sequence[int]] = (),
    comm: bool = False,
    product: bool = False,
    communicates: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a function as an op: tensors first (None for an absent one), then static options.

    Parameters before the `*` are operands, given by position or by name; those after it options.

    On plain tensors the function simply runs. On typed values (inside `lower`) the signature says
    what each mesh axis does to it. Shapes must come from the operands at hand: the same body sees
    whole arrays on one device and shards on a mesh.

    Args:
        signature: for example "... d!, d! -> ... d!" (see `signature.parse`), or a function of the
            operands' ranks that returns such a text.
        linear: sets of operand positions in which the function is jointly linear, so that a
            pending sum may pass: [[0]] for a function linear in its first operand.
        comm: pass a comm over the signature's labels as first argument (`comm.axis_index("v")`),
            for functions that need the offset of a cut label, or own one.
        product: promise that the function is exactly the contraction that its labels spell, so
            that its weight gradient may be computed later (zero-bubble schedules).

    Returns:
        A decorator.

    Reference: DESIGN section 2, "One rule engine".
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        operands = _operands(fn)[int(comm) :]
        names = {p.name for p in operands}

        @functools.wraps(fn)
        def call(*tensors: Any, **options: Any) -> Any:
            if not names.isdisjoint(options):
                tensors = _bind(operands, tensors, options)
                options = {k: v for k, v in options.items() if k not in names}
            if has_torch_function(tensors):
                return handle_torch_function(call, tensors, *tensors, **options)
            return fn(SINGLE, *tensors, **options) if comm else fn(*tensors, **options)

        call.rule = OpRule(  # type: ignore[attr-defined]
            name=fn.__name__,
            fn=fn,
            signature=signature,
            linear=tuple(tuple(group) for group in linear),
            comm=comm,
            product=product,
            communicates=communicates,
            operands=tuple(p.name for p in operands),
        )
        return call

    return decorate


def _operands(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(fn).parameters.values() if p.kind in positional]


def _bind(
    operands: list[inspect.Parameter], tensors: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...]:
    """Put operands given by name at their positions, where typed tensors are looked for."""
    bound = list(tensors)
    named = [i for i, p in enumerate(operands) if p.name in options]
    if named[0] < len(bound):
        raise TypeError(f"operand {operands[named[0]].name!r} is given twice.")
    for p in operands[len(bound) : named[-1] + 1]:
        if p.name not in options and p.default is inspect.Parameter.empty:
            raise TypeError(f"operand {p.name!r} is missing.")
        bound.append(options.get(p.name, p.default))
    return tuple(bound)
