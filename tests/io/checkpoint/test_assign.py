"""Who writes what, and what the ranks may not disagree on."""

import re

import pytest
import torch

from megatree.io.checkpoint.assign import assign
from megatree.io.checkpoint.box import first_overlap, volume
from megatree.io.checkpoint.piece import Leaf

FIX = "Pass the pieces of every rank, cut into equal or disjoint boxes of one declared leaf."


def leaf(path: str, *shape: int, dtype: torch.dtype = torch.float32) -> Leaf:
    axes = " ".join(["layers", "embed"][: len(shape)])
    return Leaf(path=path, shape=shape, dtype=dtype, axes=axes)


def nbytes(share) -> int:
    return sum(one.box_nbytes(box) for one, box in share)


def test_replicas_share_one_large_leaf_evenly():
    """Only here: a stacked model has few leaves, so whole leaves cannot balance."""
    big = leaf("blocks.w", 8, 64)
    shares = assign([[(big, ((0, 8), (0, 64)))]] * 4, "c", block_bytes=64)
    assert [nbytes(share) for share in shares] == [512] * 4
    boxes = [box for share in shares for _, box in share]
    assert first_overlap(boxes) is None
    assert sum(map(volume, boxes)) == 512
    assert [len(share) for share in shares] == [1] * 4


def test_no_part_is_smaller_than_a_block():
    small = leaf("norm", 32)
    shares = assign([[(small, ((0, 32),))]] * 4, "c", block_bytes=128)
    assert [nbytes(share) for share in shares] == [128, 0, 0, 0]
    scalar = leaf("step")
    assert assign([[(scalar, ())]] * 2, "c", block_bytes=64) == [[(scalar, ())], []]


def test_replicas_go_to_the_ranks_with_least_of_their_own():
    own, shared = leaf("a", 100), leaf("b", 150)
    held = [[(own, ((0, 100),)), (shared, ((0, 150),))], [(shared, ((0, 150),))]]
    assert assign(held, "c", block_bytes=600) == [[(own, ((0, 100),))], [(shared, ((0, 150),))]]


def test_empty_boxes_are_nobodys_work():
    uneven = leaf("w", 2)
    held = [[(uneven, ((0, 1),))], [(uneven, ((1, 2),))], [(uneven, ((2, 2),))]]
    assert [len(share) for share in assign(held, "c", block_bytes=64)] == [1, 1, 0]


W = leaf("blocks.k", 4, 8)
CONTRADICTIONS = {
    "overlap": (
        [[(W, ((0, 2), (0, 8)))], [(W, ((1, 4), (0, 8)))]],
        "blocks.k: the boxes [0:2, 0:8] (rank 0) and [1:4, 0:8] (rank 1) overlap without being "
        "equal",
    ),
    "gap": (
        [[(W, ((0, 2), (0, 8)))], [(W, ((2, 4), (0, 5)))]],
        "blocks.k: 26 of 32 elements are held, no rank holds [2:4, 5:8]",
    ),
    "only empty boxes": (
        [[(W, ((0, 0), (0, 8)))]],
        "blocks.k: 0 of 32 elements are held, no rank holds [0:4, 0:8]",
    ),
    "two leaves of one name": (
        [[(W, ((0, 4), (0, 8)))] * 2],
        "blocks.k: rank 0 passes the box [0:4, 0:8] twice",
    ),
    "two shapes": (
        [[(W, ((0, 4), (0, 8)))], [(leaf("blocks.k", 4, 9), ((0, 4), (0, 9)))]],
        "blocks.k float32 (4, 8) 'layers embed' on rank 0, "
        "blocks.k float32 (4, 9) 'layers embed' on rank 1",
    ),
    "two dtypes": (
        [[(W, ((0, 4), (0, 8)))], [(leaf("blocks.k", 4, 8, dtype=torch.half), ((0, 4), (0, 8)))]],
        "blocks.k float32 (4, 8) 'layers embed' on rank 0, "
        "blocks.k float16 (4, 8) 'layers embed' on rank 1",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_name_leaf_ranks_and_boxes(case):
    held, problem = CONTRADICTIONS[case]
    text = f"run/step_00000001: 1 leaf cannot be saved.\n  {problem}\n{FIX}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        assign(held, "run/step_00000001", block_bytes=64)


def test_all_bad_leaves_are_listed_up_to_eight():
    held = [[(leaf(f"w{i}", 4), ((0, 3),)) for i in range(10)]]
    with pytest.raises(ValueError, match="10 leaves cannot be saved") as caught:
        assign(held, "c", block_bytes=64)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  w0: 3 of 4 elements are held, no rank holds [3:4]"
    assert lines[8].startswith("  w7: ")
    assert lines[9:] == ["  and 2 more", FIX]
