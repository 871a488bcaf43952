"""Whole documents side by side in rows of a fixed length, none cut, little room left over."""

import numpy as np
from jaxtyping import Int64, Integer


def pack(
    lengths: Integer[np.ndarray, " num_items"], capacity: int
) -> tuple[Int64[np.ndarray, " num_items"], Int64[np.ndarray, " num_bounds"]]:
    """Return (items, bounds): row r holds `items[bounds[r]:bounds[r + 1]]`.

    Best fit decreasing: the longest item first, each into the fullest row that has room. Law: every
    item is in one row, and no row holds more than `capacity`.

    Args:
        lengths: of each item, 0 to `capacity`.
        capacity: of a row.

    Raises:
        ValueError: an item does not fit a row.

    >>> items, bounds = pack(np.array([3, 5, 2]), 5)
    >>> items.tolist(), bounds.tolist()
    ([1, 0, 2], [0, 1, 3])
    """
    if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= capacity:
        bad = int(np.argmax((lengths < 0) | (lengths > capacity)))
        raise ValueError(
            f"pack: item {bad} of {lengths[bad]} tokens does not fit a row of {capacity}. "
            "Drop or cut longer items first."
        )
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room -> rows
    rooms = 0  # bit r is set while a row has room r
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    bounds = np.cumsum([0, *(len(row) for row in rows)])
    return np.array([item for row in rows for item in row], np.int64), bounds
