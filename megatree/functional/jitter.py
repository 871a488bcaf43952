"""Multiplicative noise by key and global element index: the same on any mesh."""

from jaxtyping import Float, Int
from torch import Tensor

from megatree.functional import keys
from megatree.functional.comm import Comm
from megatree.functional.dropout import held_index
from megatree.functional.op import op


@op("..., -> ...", linear=[[0]], comm=True)
def jitter(
    comm: Comm, x: Float[Tensor, "*n"], key: int | Int[Tensor, ""], *, rate: float
) -> Float[Tensor, "*n"]:
    """Multiply every element by a number drawn evenly from [1 - rate, 1 + rate).

    Law: the number is a function of (key, global element index) only.

    Args:
        x: any shape.
        key: 0-d int64 tensor (or int), one per call: `fold(key, layer, "router")`.
        rate: in (0, 1).

    Raises:
        ValueError: the rate is outside (0, 1).

    Reference: Fedus et al. 2021, arXiv:2101.03961, section 2.2 (input jitter).
    """
    if not 0.0 < rate < 1.0:
        raise ValueError(f"jitter: rate is {rate}. Give a rate in (0, 1).")
    labels = tuple(str(i) for i in range(x.dim()))
    drawn = keys.uniform(key, held_index(comm, labels, tuple(x.shape), x.device))
    return x * (1.0 + rate * (2.0 * drawn - 1.0)).to(x.dtype)
