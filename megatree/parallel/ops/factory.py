"""Rules of functions that make tensors: the same whole value on every rank, or a refusal."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatree.parallel.errors import ShardingError
from megatree.parallel.ops.rule import Rule, table
from megatree.parallel.scoped import factory
from megatree.parallel.sources import user_line
from megatree.parallel.typed import typed_leaves
from megatree.parallel.types import make_type

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer


def constant(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type a constant: I on every mesh axis, at its global shape, on the rank's device."""
    operands = typed_leaves((args, kwargs))
    if operands:
        raise ShardingError(
            f"{user_line()}: {name}: makes a constant from a typed tensor ({operands[0].type_}), "
            "whose value flows into Python. Use the tensor itself (x.expand, torch.stack)."
        )
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    meta = func(*args, **kwargs, device="meta")
    shape = tuple(meta.shape)
    ty = make_type(shape, meta.dtype, ((),) * len(shape), tracer.mesh_sizes)
    if func is torch.arange and "dtype" not in kwargs:
        kwargs["dtype"] = meta.dtype
    return tracer.emit(factory, (func, *args), kwargs, [ty], [meta], op=name)


def random(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Refuse torch's random state: its numbers would depend on the mesh."""
    raise ShardingError(
        f"{user_line()}: {name} draws from torch's random state, which differs by rank and mesh. "
        "Use F.dropout with a key, or megatree.functional.keys."
    )


def uninitialised(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Refuse memory as it is: every rank's holds something else."""
    raise ShardingError(
        f"{user_line()}: {name} holds what the rank's memory held, and no later write is kept. "
        "Use torch.zeros, or the result of the op that would fill it."
    )


TABLE = {
    **table(
        [
            "arange",
            "zeros",
            "ones",
            "full",
            "eye",
            "linspace",
            "tensor",
            "scalar_tensor",
            "tril_indices",
        ],
        Rule(constant, is_factory=True),
    ),
    **table(
        [
            "rand",
            "randn",
            "randint",
            "randperm",
            "normal",
            "rand_like",
            "randn_like",
            "randint_like",
            "bernoulli",
            "multinomial",
            "dropout",
            "alpha_dropout",
            "feature_dropout",
        ],
        Rule(random, is_factory=True),
    ),
    **table(["empty", "empty_like"], Rule(uninitialised, is_factory=True)),
}
del TABLE[Tensor.__rand__]  # `1 & x`, found under the name of torch.rand
