"""Rules of functions that only move elements: reshape, permute, slices, cat, split."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatree.functional.signature import Signature
from megatree.parallel.errors import ShardingError
from megatree.parallel.ops.rule import Rule, argument, dims_of, plain_call, table
from megatree.parallel.sources import user_line
from megatree.parallel.types import ShardType

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer

_LINEAR = (frozenset([0]),)


def reshape(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type reshapes: a cut dim must be outermost in its group; sizes are made local."""
    x = args[0]
    whole = plain_call(func, args, kwargs)
    if whole.dtype != x.dtype:
        raise ShardingError(
            f"{user_line()}: {name}: reads the bytes of {x.type_} as {whole.dtype}, which has no "
            "sharding rule. Use F.cast for values, or a local_map for bytes."
        )
    new = tuple(whole.shape)
    labels, out = _groups(x.type_.shape, new)
    bad = [d for d, axes in enumerate(x.type_.spec) if axes and labels[d] is None]
    if bad:
        raise ShardingError(
            f"{user_line()}: {name} {x.type_} -> {list(new)}: dim {bad[0]} is cut over "
            f"{x.type_.spec[bad[0]]} and merged behind another dim, so shards would interleave. "
            "Put the cut dim first in its group, or keep the dims apart."
        )
    sig = Signature(operands=(tuple(labels),), outputs=(tuple(out),), linear=_LINEAR)

    def localise(types: list[ShardType], args: Any, kwargs: Any) -> Any:
        return (args[0], types[0].local_shape(tracer.mesh_sizes)), {}

    return tracer.operation(
        name, torch.reshape, (x,), {}, sig, evaluate=lambda a: a.reshape(new), localise=localise
    )


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    """Label the outermost dims of the groups of dims that hold the same elements."""
    ins: list[Any] = [None] * len(old)
    outs: list[Any] = [None] * len(new)
    if 0 in old:
        return ins, outs
    i = j = count = 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        size_a = old[i] if a else 1
        size_b = new[j] if b else 1
        i, j = i + len(a), j + len(b)
        while size_a != size_b:
            if size_a < size_b:
                size_a *= old[i]
                a.append(i)
                i += 1
            else:
                size_b *= new[j]
                b.append(j)
                j += 1
        a = [d for d in a if old[d] > 1]
        b = [d for d in b if new[d] > 1]
        if a and b:
            ins[a[0]] = outs[b[0]] = f"g{count}"
            count += 1
    return ins, outs


def transpose(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type a permutation of dims."""
    x = args[0]
    order = plain_call(func, (_numbered(x.dim()), *args[1:]), kwargs).shape
    labels = tuple(str(d) for d in range(x.dim()))
    sig = Signature(operands=(labels,), outputs=(tuple(str(n - 1) for n in order),), linear=_LINEAR)
    return tracer.operation(name, func, args, kwargs, sig)


def _numbered(num_dims: int) -> Tensor:
    """Return a meta tensor whose dim d has size d + 1, to read a permutation off its shape."""
    return torch.empty(*(d + 1 for d in range(num_dims)), device="meta")


def unsqueeze(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type a new dim of size 1."""
    x, dim = args[0], argument(args, kwargs, 1, "dim")
    labels = [str(d) for d in range(x.dim())]
    out: list[str | None] = list(labels)
    out.insert(dim % (x.dim() + 1), None)
    sig = Signature(operands=(tuple(labels),), outputs=(tuple(out),), linear=_LINEAR)
    return tracer.operation(name, func, args, kwargs, sig)


def squeeze(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type the removal of dims of size 1."""
    x, dim = args[0], argument(args, kwargs, 1, "dim")
    gone = [d for d in dims_of(x, dim) if x.type_.shape[d] == 1]
    labels = tuple(str(d) for d in range(x.dim()))
    kept = tuple(label for d, label in enumerate(labels) if d not in gone)
    sig = Signature(operands=(labels,), outputs=(kept,), linear=_LINEAR)
    # The dims are named: a shard of size 1 of a larger dim must stay.
    return tracer.operation(name, torch.squeeze, (x, tuple(gone)), {}, sig)


def expand(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type broadcasts to a larger shape; sizes are made local."""
    x = args[0]
    shape = tuple(plain_call(func, args, kwargs).shape)
    skip = len(shape) - x.dim()
    labels = tuple(
        str(skip + d) if n == shape[skip + d] else None for d, n in enumerate(x.type_.shape)
    )
    out = tuple(str(d) if str(d) in labels else None for d in range(len(shape)))
    sig = Signature(operands=(labels,), outputs=(out,), linear=_LINEAR)

    def localise(types: list[ShardType], args: Any, kwargs: Any) -> Any:
        return (args[0], types[0].local_shape(tracer.mesh_sizes)), {}

    return tracer.operation(
        name, Tensor.expand, (x,), {}, sig, evaluate=lambda a: a.expand(shape), localise=localise
    )


def cat(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type concatenation: the dim is whole; a pending sum passes if all operands are pending."""
    xs, dim = args[0], argument(args, kwargs, 1, "dim", 0)
    labels = tuple(str(d) for d in range(xs[0].dim()))
    sig = Signature(
        operands=(labels,) * len(xs),
        outputs=(labels,),
        whole=frozenset([str(dim % xs[0].dim())]),
        linear=(frozenset(range(len(xs))),),
    )
    return tracer.operation(name, func, args, kwargs, sig)


def stack(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type stacking on a new dim."""
    xs, dim = args[0], argument(args, kwargs, 1, "dim", 0)
    labels = [str(d) for d in range(xs[0].dim())]
    out: list[str | None] = list(labels)
    out.insert(dim % (xs[0].dim() + 1), None)
    sig = Signature(
        operands=(tuple(labels),) * len(xs),
        outputs=(tuple(out),),
        linear=(frozenset(range(len(xs))),),
    )
    return tracer.operation(name, func, args, kwargs, sig)


def split(
    tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any, *, position: int, drop: bool
) -> Any:
    """Type split, chunk and unbind: the dim is whole."""
    x, dim = args[0], argument(args, kwargs, position, "dim", 0)
    labels = tuple(str(d) for d in range(x.dim()))
    at = str(dim % x.dim())
    out = tuple(label for label in labels if not (drop and label == at))
    sig = Signature(
        operands=(labels,),
        outputs=(out,) * len(plain_call(func, args, kwargs)),
        whole=frozenset([at]),
        linear=_LINEAR,
    )
    return tracer.operation(name, func, args, kwargs, sig)


def narrow(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type narrow and select: the dim is whole."""
    x, dim = args[0], argument(args, kwargs, 1, "dim")
    labels = tuple(str(d) for d in range(x.dim()))
    at = str(dim % x.dim())
    out = tuple(label for label in labels if not (name == "select" and label == at))
    sig = Signature(operands=(labels,), outputs=(out,), whole=frozenset([at]), linear=_LINEAR)
    return tracer.operation(name, func, args, kwargs, sig)


def getitem(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type basic indexing: a dim that is not taken whole may not be cut."""
    x, index = args
    items = list(index) if isinstance(index, tuple) else [index]
    basic = (int, slice, type(None), type(Ellipsis))
    if any(isinstance(i, bool) or not isinstance(i, basic) for i in items):
        raise ShardingError(
            f"{user_line()}: indexing {x.type_} with a tensor or list has no sharding rule. "
            "Use F.embedding, torch.where or a local_map."
        )
    used = sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (x.dim() - used)
    labels = tuple(str(d) for d in range(x.dim()))
    out: list[str | None] = []
    whole: set[str] = set()
    dim = 0
    for item in items:
        if item is None:
            out.append(None)
            continue
        if isinstance(item, slice):
            out.append(labels[dim])
        if not isinstance(item, slice) or item.indices(x.type_.shape[dim]) != (
            0,
            x.type_.shape[dim],
            1,
        ):
            whole.add(labels[dim])
        dim += 1
    sig = Signature(
        operands=(labels,), outputs=(tuple(out),), whole=frozenset(whole), linear=_LINEAR
    )
    return tracer.operation("getitem", func, args, kwargs, sig)


def gather(
    tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any, *, positions: tuple[int, int]
) -> Any:
    """Type gather along a whole dim; row i reads row i, so dims whose sizes differ are whole
    too.
    """
    x = args[0]
    dim = argument(args, kwargs, positions[0], "dim")
    index = argument(args, kwargs, positions[1], "index", kwargs.get("indices"))
    if dim is None or index.dim() != x.dim():
        raise ShardingError(
            f"{user_line()}: {name}: has a sharding rule for an index of as many dims as the value "
            f"({x.dim()}) and a dim. Give both."
        )
    labels = tuple(str(d) for d in range(x.dim()))
    differ = {str(d) for d in range(x.dim()) if x.shape[d] != index.shape[d]}
    sig = Signature(
        operands=(labels, labels),
        outputs=(labels,),
        whole=frozenset({str(dim % x.dim()), *differ}),
        linear=_LINEAR,
    )
    return tracer.operation(name, func, args, kwargs, sig)


TABLE = {
    **table(
        ["reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel"], Rule(reshape)
    ),
    **table(
        ["transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "adjoint"],
        Rule(transpose),
    ),
    getattr(Tensor.T, "__get__"): Rule(transpose),  # noqa: B009 (a descriptor to type checkers)
    getattr(Tensor.mT, "__get__"): Rule(transpose),  # noqa: B009
    **table(["unsqueeze"], Rule(unsqueeze)),
    **table(["squeeze"], Rule(squeeze)),
    **table(["expand", "expand_as", "broadcast_to"], Rule(expand)),
    **table(["cat", "concat", "concatenate"], Rule(cat)),
    **table(["stack"], Rule(stack)),
    **table(["chunk", "split", "tensor_split"], Rule(partial(split, position=2, drop=False))),
    **table(["unbind"], Rule(partial(split, position=1, drop=True))),
    **table(["narrow", "select"], Rule(narrow)),
    **table(["getitem"], Rule(getitem)),
    **table(["gather"], Rule(partial(gather, positions=(1, 2)))),
    **table(["take_along_dim"], Rule(partial(gather, positions=(2, 1)))),
}
