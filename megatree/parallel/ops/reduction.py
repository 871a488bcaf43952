"""Rules of reductions and of functions that need a dim whole: softmax, norms, sorting, scans."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatree.functional.signature import Signature
from megatree.parallel.ops.rule import Rule, argument, dims_of, table
from megatree.parallel.typed import typed_leaves

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer


def _signature(
    num_dims: int, dims: list[int], keepdim: bool, *, whole: bool, linear: bool, outputs: int = 1
) -> Signature:
    labels: list[str | None] = [str(d) for d in range(num_dims)]
    gone = frozenset(str(d) for d in dims)
    out = tuple(
        (None if label in gone else label) for label in labels if keepdim or label not in gone
    )
    return Signature(
        operands=(tuple(labels),),
        outputs=(out,) * outputs,
        sums=frozenset() if whole else gone,
        whole=gone if whole else frozenset(),
        linear=(frozenset([0]),) if linear else (),
    )


def total(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type sum and mean; the mean divides by the *global* count."""
    x = args[0]
    dims = dims_of(x, argument(args, kwargs, 1, "dim"))
    keepdim = bool(argument(args, kwargs, 2, "keepdim", False))
    sig = _signature(x.dim(), dims, keepdim, whole=False, linear=True)
    if name == "sum" or not any(x.type_.spec[d] for d in dims):
        return tracer.operation(name, func, args, kwargs, sig)
    dtype = {k: v for k, v in kwargs.items() if k == "dtype"}
    sums = tracer.operation("mean", torch.sum, (x, dims, keepdim), dtype, sig)
    return sums * (1.0 / math.prod(x.type_.shape[d] for d in dims))


def whole_reduction(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type reductions that are no sum (amax, logsumexp, argmax): the reduced dims stay whole."""
    x = args[0]
    dim = argument(args, kwargs, 1, "dim")
    if isinstance(argument(args, kwargs, 1, "other"), Tensor):  # max(x, y), of two tensors
        binary = torch.maximum if name == "max" else torch.minimum
        return tracer.dispatch(binary, args, kwargs)
    keepdim = bool(argument(args, kwargs, 2, "keepdim", False))
    pair = name in ("max", "min") and dim is not None
    sig = _signature(
        x.dim(), dims_of(x, dim), keepdim, whole=True, linear=False, outputs=2 if pair else 1
    )
    out = tracer.operation(name, func, args, kwargs, sig)
    return getattr(torch.return_types, name)(out) if pair else out


def along(
    tracer: "Tracer",
    name: str,
    func: Any,
    args: Any,
    kwargs: Any,
    *,
    position: int = 1,
    default: int | None = None,
    linear: bool = False,
    outputs: int = 1,
) -> Any:
    """Type functions along a dim that must be whole and stays (softmax, cumsum, sort, topk)."""
    x = args[0]
    dim = argument(args, kwargs, position, "dim", default)
    labels = tuple(str(d) for d in range(x.dim()))
    sig = Signature(
        operands=(labels,),
        outputs=(labels,) * outputs,
        whole=frozenset(str(d) for d in dims_of(x, dim)),
        linear=(frozenset([0]),) if linear else (),
    )
    out = tracer.operation(name, func, args, kwargs, sig)
    return getattr(torch.return_types, name)(out) if outputs > 1 else out


def flip(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type a reversal of dims, which are whole."""
    dims = kwargs["dims"] if "dims" in kwargs else args[1] if len(args) == 2 else args[1:]
    return along(tracer, name, torch.flip, (args[0], dims), {}, linear=True)


def norm(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type F.layer_norm and F.rms_norm: the normalised dims are whole."""
    x, shape = args[0], argument(args, kwargs, 1, "normalized_shape")
    labels = tuple(str(d) for d in range(x.dim()))
    last = labels[x.dim() - len(shape) :]
    others = len(typed_leaves((args, kwargs))) - 1
    sig = Signature(operands=(labels, *[last] * others), outputs=(labels,), whole=frozenset(last))
    return tracer.operation(name, func, args, kwargs, sig)


def triangle(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type tril and triu, which look at indices of the last two dims: both whole."""
    labels = tuple(str(d) for d in range(args[0].dim()))
    sig = Signature(
        operands=(labels,),
        outputs=(labels,),
        whole=frozenset(labels[-2:]),
        linear=(frozenset([0]),),
    )
    return tracer.operation(name, func, args, kwargs, sig)


TABLE = {
    **table(["tril", "triu"], Rule(triangle)),
    **table(["sum", "mean"], Rule(total)),
    **table(
        [
            "amax",
            "amin",
            "max",
            "min",
            "logsumexp",
            "argmax",
            "argmin",
            "all",
            "any",
            "prod",
            "count_nonzero",
        ],
        Rule(whole_reduction),
    ),
    **table(["softmax", "log_softmax"], Rule(along)),
    **table(["cumsum"], Rule(partial(along, linear=True))),
    **table(["cumprod", "logcumsumexp"], Rule(along)),
    **table(["sort"], Rule(partial(along, default=-1, outputs=2))),
    **table(["argsort"], Rule(partial(along, default=-1))),
    **table(["topk"], Rule(partial(along, position=2, default=-1, outputs=2))),
    **table(["flip"], Rule(flip)),
    **table(["layer_norm", "rms_norm"], Rule(norm)),
}
