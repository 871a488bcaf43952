"""Which rank writes which boxes: a pure function of what all ranks hold."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from megatree.io.checkpoint.box import (
    Box,
    first_gap,
    first_overlap,
    spelled,
    split,
    volume,
    whole,
)
from megatree.io.checkpoint.listing import leaves, listing
from megatree.io.checkpoint.piece import Leaf

Part: TypeAlias = tuple[Leaf, Box]
Holders: TypeAlias = Mapping[Leaf, Mapping[Box, list[int]]]


def assign(held: Sequence[Sequence[Part]], place: str, *, block_bytes: int) -> list[list[Part]]:
    """Share the writing of the boxes that the ranks hold.

    Law: the parts of all ranks cover each leaf once, each part lies in a box its rank holds, and
    the bytes are balanced among the holders of equal boxes: a box that n ranks hold is cut in up
    to n parts of at least `block_bytes`. The same input gives the same shares, so every rank
    computes them for itself.

    Args:
        held: per rank, the (leaf, box) of its pieces.
        place: the checkpoint, for errors.
        block_bytes: smallest part, bytes.

    Returns:
        Per rank, its parts in order of path and box.

    Raises:
        ValueError: listing the leaves on which the ranks contradict each other, that have boxes
            that overlap without being equal, or elements no rank holds.
    """
    holders, problems = _holders(held)
    for leaf, boxes in holders.items():
        problems += _cover_problem(leaf, boxes)
    if problems:
        what = leaves(len(problems), "cannot be saved", "cannot be saved")
        fix = (
            "Pass the pieces of every rank, cut into equal or disjoint boxes of one declared leaf."
        )
        raise ValueError(listing(place, what, problems, fix))
    return _share(holders, len(held), block_bytes)


def _holders(held: Sequence[Sequence[Part]]) -> tuple[Holders, list[str]]:
    """Return the ranks that hold each box, and what the ranks disagree on."""
    holders: dict[Leaf, dict[Box, list[int]]] = {}
    declared: dict[str, tuple[Leaf, int]] = {}
    problems = {}
    for rank, parts in enumerate(held):
        for leaf, box in parts:
            first, first_rank = declared.setdefault(leaf.path, (leaf, rank))
            if leaf != first:
                problems[leaf.path] = f"{first} on rank {first_rank}, {leaf} on rank {rank}"
                continue
            ranks = holders.setdefault(leaf, {}).setdefault(box, [])
            if rank in ranks and volume(box):
                # not a replica: two leaves of one name, one of which would be lost
                problems[leaf.path] = (
                    f"{leaf.path}: rank {rank} passes the box {spelled(box)} twice"
                )
            ranks.append(rank)
    good = {leaf: boxes for leaf, boxes in holders.items() if leaf.path not in problems}
    return dict(sorted(good.items(), key=lambda item: item[0].path)), list(problems.values())


def _cover_problem(leaf: Leaf, boxes: Mapping[Box, list[int]]) -> list[str]:
    filled = [box for box in boxes if volume(box)]
    overlap = first_overlap(filled)
    if overlap:
        one, two = (f"{spelled(box)} (rank {boxes[box][0]})" for box in overlap)
        return [f"{leaf.path}: the boxes {one} and {two} overlap without being equal"]
    total, covered = volume(whole(leaf.shape)), sum(map(volume, filled))
    if covered < total:
        gap = spelled(first_gap(whole(leaf.shape), filled) or ())
        return [f"{leaf.path}: {covered} of {total} elements are held, no rank holds {gap}"]
    return []


def _share(holders: Holders, size: int, block_bytes: int) -> list[list[Part]]:
    parts = [
        (part, leaf, ranks)
        for leaf, boxes in holders.items()
        for box, ranks in boxes.items()
        if volume(box)
        for part in split(box, min(len(ranks), leaf.box_nbytes(box) // block_bytes))
    ]
    # what only one rank can write comes first, then the largest: the rest fills the valleys
    parts.sort(key=lambda p: (len(p[2]) > 1, -p[1].box_nbytes(p[0]), p[1].path, p[0]))
    shares: dict[int, list[Part]] = defaultdict(list)
    load = [0] * size
    for box, leaf, ranks in parts:
        rank = min(ranks, key=lambda r: (load[r], r))
        load[rank] += leaf.box_nbytes(box)
        shares[rank].append((leaf, box))
    return [sorted(shares[r], key=lambda part: (part[0].path, part[1])) for r in range(size)]
