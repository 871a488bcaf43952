"""`shard` and `as_partial`: the only two annotations in a model; on plain tensors both are the
identity.
"""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from megatree.functional.param import axis_names


def shard(x: Tensor, axes: str) -> Tensor:
    """Lay a value out as the rules say for its logical axes; the identity on the global value.

    This is the only thing that moves data in a model: a pending sum is discharged, a cut dim is
    gathered, a whole one is cut. The names bind to the dims' sizes and are checked against every
    other use of the same name.

    Args:
        x: a tensor of any shape.
        axes: one logical axis name per dim, separated by blanks; "_" leaves a dim unnamed;
            "" for a scalar.

    Returns:
        The same value.

    Raises:
        ValueError: the number of names differs from the number of dims.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(shard, (x,), x, axes)
    names = axis_names(axes, "shard")
    if len(names) != x.dim():
        raise ValueError(
            f"shard: {axes!r} names {len(names)} axes, the value has {x.dim()} dims "
            f"{tuple(x.shape)}. "
            "Give one name per dim."
        )
    return x


def as_partial(x: Tensor, axis: str) -> Tensor:
    """Turn a value that all ranks share into a pending sum over a logical axis (kept on
    coordinate 0).

    Args:
        x: a tensor of any shape.
        axis: a logical axis name; its mesh axes carry the pending sum.

    Returns:
        The same global value.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(as_partial, (x,), x, axis)
    return x
