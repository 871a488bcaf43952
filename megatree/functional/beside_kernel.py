"""Gradients of parts side by side, and their sums over rows, in one pass: a Triton kernel."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, TIMES = 16, 256, 16
"""Elements of a tile, and the tiles below each other that a program takes."""


@triton.jit
def _place(
    part,
    out,
    sums,
    n,
    start,
    width,
    total,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TIMES: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Copy a part to its columns of the whole; the sums of a program's rows are a row of sums."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = tl.program_id(0).to(tl.int64) * (ROWS * TIMES)
    added = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(TIMES):
        row = first + i * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < n) & (column < width)
        value = tl.load(part + row * width + column, inside, other=0.0)
        tl.store(out + row * total + start + column, value, inside)
        added += value.to(tl.float32)
    place = sums + tl.program_id(0).to(tl.int64) * total + start + column
    tl.store(place, tl.sum(added, 0)[None, :], column < width)


def side_by_side_and_sums(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return parts side by side, and their sums over all but the last dim.

    Args:
        parts: each [..., n_i], dense, no wider than float32.

    Returns:
        [..., sum of n_i] of their dtype, and [sum of n_i] in float32.
    """
    total = sum(part.shape[-1] for part in parts)
    out = parts[0].new_empty(*parts[0].shape[:-1], total)
    n = out.numel() // total
    blocks = triton.cdiv(n, ROWS * TIMES)
    sums = torch.empty(blocks, total, dtype=torch.float32, device=out.device)
    start = 0
    for part in parts:
        width = part.shape[-1]
        _place[(blocks, triton.cdiv(width, COLUMNS))](
            part, out, sums, n, start, width, total, ROWS=ROWS, COLUMNS=COLUMNS, TIMES=TIMES
        )
        start += width
    return out, sums.sum(0)
