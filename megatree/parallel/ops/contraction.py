"""Rules of products: einsum, matmul and linear; a cut label that is contracted gives a pending
sum.
"""

from typing import TYPE_CHECKING, Any

import torch

from megatree.functional.signature import Signature
from megatree.parallel.errors import ShardingError
from megatree.parallel.ops.rule import Rule, argument, table
from megatree.parallel.sources import user_line
from megatree.parallel.typed import typed_leaves

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer


def contraction(ins: list[list[Any]], out: list[Any]) -> Signature:
    """Return the signature of a product: labels that vanish are summed, linear in each operand."""
    gone = {x for labels in ins for x in labels if x is not None} - set(out)
    return Signature(
        operands=tuple(map(tuple, ins)),
        outputs=(tuple(out),),
        sums=frozenset(gone),
        linear=tuple(frozenset([i]) for i in range(len(ins))),
        product=True,
    )


def einsum(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type torch.einsum; "..." stands for leading dims of one rank."""
    text, *rest = args
    operands = typed_leaves(rest)
    left, _, right = text.replace(" ", "").partition("->")
    parts = left.split(",")
    if "->" not in text or len(parts) != len(operands):
        raise ShardingError(
            f"{user_line()}: einsum {text!r}: {len(operands)} operands, and the output must be "
            'written out. Write it as "a b, b c -> a c".'
        )
    dots = {x.dim() - len(p) + 3 for p, x in zip(parts, operands, strict=True) if "..." in p}
    if len(dots) > 1 or any(
        len(p) != x.dim() for p, x in zip(parts, operands, strict=True) if "..." not in p
    ):
        raise ShardingError(
            f"{user_line()}: einsum {text!r}: operands have {[x.dim() for x in operands]} dims. "
            'Give every dim a label; "..." stands for as many dims in every operand.'
        )

    def labels(part: str) -> list[str]:
        before, dot, after = part.partition("...")
        return [*before, *(f"...{i}" for i in range(max(dots, default=0) if dot else 0)), *after]

    sig = contraction([labels(p) for p in parts], labels(right))
    return tracer.operation(f"einsum {text!r}", func, args, kwargs, sig)


def matmul(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type a matrix product with broadcast leading dims."""
    a, b = typed_leaves((args, kwargs)) if len(typed_leaves((args, kwargs))) == 2 else (None, None)
    if a is None or b is None:
        raise ShardingError(f"{user_line()}: {name}: takes two typed operands.")
    if name == "rmatmul":
        a, b = b, a
        args, func = (args[1], args[0]), torch.matmul
    left = ["m", "k"][2 - min(a.dim(), 2) :]
    right = ["k", "n"][: min(b.dim(), 2)]
    batch = torch.broadcast_shapes(a.type_.shape[:-2], b.type_.shape[:-2])

    def lead(x: Any) -> list[str | None]:
        shape = x.type_.shape[:-2]
        skip = len(batch) - len(shape)
        return [f"b{skip + i}" if n == batch[skip + i] else None for i, n in enumerate(shape)]

    out = [f"b{i}" for i in range(len(batch))]
    out += [x for x in left if x == "m"] + [x for x in right if x == "n"]
    sig = contraction([lead(a) + left, lead(b) + right], out)
    return tracer.operation(name, func, args, kwargs, sig)


def linear(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type F.linear; a bias is refused where the product is a pending sum (it would count n
    times).
    """
    x = args[0]
    bias = argument(args, kwargs, 2, "bias")
    lead = [str(i) for i in range(x.dim() - 1)]
    if bias is None:
        return tracer.operation(
            name, func, args, kwargs, contraction([[*lead, "k"], ["o", "k"]], [*lead, "o"])
        )
    if x.type_.spec[-1]:
        raise ShardingError(
            f"{user_line()}: linear: the contracted dim of {x.type_} is cut over "
            f"{x.type_.spec[-1]}, so the product is a pending sum and the bias would be added "
            "once per rank. Add the bias after shard(product, ...)."
        )
    sig = Signature(
        operands=((*lead, "k"), ("o", "k"), ("o",)),
        outputs=((*lead, "o"),),
        sums=frozenset("k"),
    )
    return tracer.operation(name, func, args, kwargs, sig)


def outer(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type an outer product of two vectors."""
    return tracer.operation(name, func, args, kwargs, contraction([["m"], ["n"]], ["m", "n"]))


TABLE = {
    **table(["einsum"], Rule(einsum)),
    **table(["matmul", "mm", "bmm", "mv", "dot", "rmatmul"], Rule(matmul)),
    **table(["linear"], Rule(linear)),
    **table(["outer"], Rule(outer)),
}
