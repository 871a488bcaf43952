"""Packed documents: ids, starts and positions are three spellings of one thing."""

import pytest
import torch

from megatree.functional.documents import (
    check_segment_ids,
    cu_seqlens_of,
    positions_of,
    segment_ids_of,
)


def test_ids_give_back_the_starts_they_came_from() -> None:
    starts = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    ids = segment_ids_of(starts, 9)
    assert ids.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert torch.equal(cu_seqlens_of(ids[None]), starts)
    assert positions_of(ids).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    rows = torch.stack([ids, torch.zeros_like(ids)])
    assert cu_seqlens_of(rows).tolist() == [0, 3, 4, 9, 18]
    assert positions_of(rows)[1].tolist() == list(range(9))


@pytest.mark.parametrize("starts", [[], [1, 3], [0, 5, 3], [0, 10]])
def test_starts_that_are_none_are_refused(starts: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"cu_seqlens: .* are no starts of documents in a row of 9"
    ):
        segment_ids_of(torch.tensor(starts, dtype=torch.int64), 9)


def test_ids_that_fall_are_named_by_row_and_token() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 3, 1]])
    with pytest.raises(
        ValueError, match=r"here: segment ids fall from 3 to 1 at row 1, token 2 of"
    ):
        check_segment_ids(ids, "here")
    check_segment_ids(ids[:1], "here")
