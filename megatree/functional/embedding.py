"""Rows of a table by index."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatree.functional.comm import Comm
from megatree.functional.op import op


@op("..., v+ d -> ... d", linear=[[1]], comm=True)
def embedding(
    comm: Comm, ids: Int[Tensor, "*n"], table: Float[Tensor, "v d"]
) -> Float[Tensor, "*n d"]:
    """Look rows of a table up.

    On a table cut along its rows each rank returns its own rows and zeros for the others: a
    pending sum, which `shard` discharges.

    Args:
        ids: row numbers in [0, v), any shape.
        table: [v, d].

    Returns:
        [..., d].

    Raises:
        IndexError: (on CPU) an id is outside the table, unless the table is cut.
    """
    if comm.axis_size("v") == 1:
        return torch.nn.functional.embedding(ids, table)
    rows = table.shape[0]
    local = ids - comm.axis_index("v") * rows
    elsewhere = (local < 0) | (local >= rows)
    found = torch.nn.functional.embedding(local.masked_fill(elsewhere, 0), table)
    return found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
