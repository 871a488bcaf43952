"""Boxes are read beside one another, a few at a time, and come in order."""

import threading
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megatree.io.checkpoint import Box
from megatree.io.formats.arrays import Array, boxes_of, copy, read_ahead
from tests.io.formats.in_memory import InMemory, all_of, samples


class Together(InMemory):
    """A reader each of whose reads waits until so many are under way."""

    def __init__(self, tensors: Mapping[str, Tensor], count: int) -> None:
        super().__init__(tensors)
        self.gate = threading.Barrier(count)

    def read(self, path: str, box: Box) -> Tensor:
        self.gate.wait(timeout=20)
        return super().read(path, box)


def test_four_boxes_are_under_way_at_once_and_come_in_order() -> None:
    reader = Together({"a": torch.arange(64)}, 4)
    got = [data for _, _, data in read_ahead(reader, boxes_of(reader, 32), 4)]
    assert torch.equal(torch.cat(got), torch.arange(64))


class Counted(InMemory):
    """A reader that notes how many boxes were read and not yet taken."""

    held = most = 0

    def read(self, path: str, box: Box) -> Tensor:
        self.held += 1
        self.most = max(self.most, self.held)
        return super().read(path, box)


class Taker:
    """A writer that takes from a `Counted`."""

    def __init__(self, reader: Counted) -> None:
        self.reader, self.finished = reader, False

    def write(self, path: str, box: Box, data: Tensor) -> None:
        self.reader.held -= 1

    def finish(self) -> None:
        self.finished = True


def test_a_copy_holds_no_more_boxes_than_it_reads_ahead() -> None:
    reader = Counted({"a": torch.zeros(1000)})
    taker = Taker(reader)
    copy(reader, taker, most_bytes=40)
    assert taker.finished
    assert reader.held == 0
    assert 1 < reader.most <= 5, "four that wait, and the one that is written"


class Broken(InMemory):
    """A reader whose tenth element cannot be read."""

    def read(self, path: str, box: Box) -> Tensor:
        if box[0][0] == 10:
            raise ValueError("a: damaged")
        return super().read(path, box)


def test_what_cannot_be_read_is_told_after_what_came_before_it() -> None:
    reader, got = Broken({"a": torch.arange(20)}), []
    with pytest.raises(ValueError, match="a: damaged"):
        got.extend(data.item() for _, _, data in read_ahead(reader, boxes_of(reader, 8)))
    assert got == list(range(10))


def test_every_array_is_carried_over() -> None:
    tensors = samples()
    reader = InMemory(tensors)
    paths = {path for path, _ in boxes_of(reader, 50)}
    assert paths == {path for path, x in tensors.items() if x.numel()}
    assert isinstance(reader.arrays["params.a"], Array)
    assert sorted(all_of(reader)) == sorted(tensors)
