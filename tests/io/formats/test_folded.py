"""Boxes of arrays made of the same axes: against reshape, permute and slices of whole tensors."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatree.io.checkpoint.box import extents
from megatree.io.formats.arrays import Array
from megatree.io.formats.folded import Entry, Folded, Part, Side
from tests.io.formats.in_memory import InMemory

Axes = tuple[tuple[str, int, int], ...]


def side(dims: list[list[str]], sizes: dict[str, int], **parts: tuple[int, int]) -> Side:
    spans = {axis: (axis, *parts.get(axis, (0, size))) for axis, size in sizes.items()}
    return Side(dims=tuple(tuple(spans[axis] for axis in group) for group in dims))


@st.composite
def regrouped(draw: st.DrawFn) -> tuple[dict[str, int], list[list[str]], list[list[str]]]:
    """Draw sizes of axes and two orders and groupings of them."""
    letters: list[str] = ["a", "b", "c", "d", "e"]
    axes = letters[: draw(st.integers(1, 5))]
    sizes = {axis: draw(st.integers(1, 4)) for axis in axes}

    def grouping() -> list[list[str]]:
        order = draw(st.permutations(axes))
        cuts = sorted(draw(st.sets(st.integers(1, len(axes)), max_size=3)) | {len(axes)})
        starts = [0, *cuts[:-1]]
        return [order[a:b] for a, b in zip(starts, cuts, strict=True)]

    return sizes, grouping(), grouping()


@given(regrouped(), st.data())
def test_any_box_is_that_of_the_regrouped_whole(
    case: tuple[dict[str, int], list[list[str]], list[list[str]]], data: st.DataObject
) -> None:
    sizes, ours, theirs = case
    foreign = side(theirs, sizes)
    tensor = torch.arange(1, 1 + torch.Size(foreign.shape).numel()).reshape(foreign.shape)
    whole = regroup(tensor, theirs, ours, sizes)
    own = side(ours, sizes)
    array = Array(shape=own.shape, dtype=tensor.dtype)
    parts = (Part(path="x", side=foreign),)
    reader = Folded(
        source=InMemory({"x": tensor}), entries={"y": Entry(array=array, side=own, parts=parts)}
    )
    box = tuple(
        (start, data.draw(st.integers(start, size)))
        for size in own.shape
        for start in [data.draw(st.integers(0, size))]
    )
    got = reader.read("y", box)
    assert got.shape == extents(box)
    assert torch.equal(got, whole[tuple(slice(*edge) for edge in box)])


def regroup(
    x: Tensor, before: list[list[str]], after: list[list[str]], sizes: dict[str, int]
) -> Tensor:
    flat = [axis for group in before for axis in group]
    order = [axis for group in after for axis in group]
    atoms = x.reshape([sizes[axis] for axis in flat]).permute([flat.index(a) for a in order])
    return atoms.reshape([torch.Size([sizes[a] for a in group]).numel() for group in after])


def fused() -> tuple[Folded, Tensor]:
    """Return keys of a fused product of 3 key heads, 8 query heads each, and that product."""
    tensor = torch.arange(3 * 10 * 2 * 5).reshape(60, 5)
    theirs = Side(dims=((("g", 0, 3), ("slot", 0, 10), ("k", 0, 2)), (("d", 0, 5),)))
    own = Side(dims=((("g", 0, 3),), (("k", 0, 2),), (("d", 0, 5),)), within=(("slot", 8, 9),))
    entry = Entry(
        array=Array(shape=(3, 2, 5), dtype=tensor.dtype),
        side=own,
        parts=(Part(path="qkv", side=theirs),),
    )
    return Folded(source=InMemory({"qkv": tensor}), entries={"wk": entry}), tensor


def test_a_part_is_read_without_the_rest() -> None:
    """Keys are a tenth of what lies between them: reads must not bring all of it."""
    reader, tensor = fused()
    got = reader.read("wk", ((0, 3), (0, 2), (0, 5)))
    assert torch.equal(got, tensor.view(3, 10, 2, 5)[:, 8])
    assert isinstance(reader.source, InMemory)
    assert reader.source.largest == 2 * 5


def test_what_no_part_holds_is_zero() -> None:
    """A padded vocabulary: rows beyond the real ones."""
    own = Side(dims=((("vocab", 0, 6),),))
    theirs = Side(dims=((("vocab", 0, 4),),))
    entry = Entry(
        array=Array(shape=(6,), dtype=torch.int64), side=own,
        parts=(Part(path="x", side=theirs),),
    )  # fmt: skip
    reader = Folded(source=InMemory({"x": torch.tensor([1, 2, 3, 4])}), entries={"y": entry})
    assert reader.read("y", ((2, 6),)).tolist() == [3, 4, 0, 0]
