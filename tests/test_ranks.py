"""The harness for several ranks must fail when a rank fails, and say which and why."""

import os
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import warm
from tests.ranks import ranks


@pytest.mark.parametrize("scale", [1.0, 2.0])
@ranks(2)
def test_ranks_see_each_other_parameters_and_fixtures(scale: float, tmp_path: Path) -> None:
    total = torch.tensor([scale * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    torch.testing.assert_close(total, torch.tensor([3 * scale]))
    (tmp_path / f"{dist.get_rank()}").touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == dist.get_world_size() == 2


@ranks(3)
def test_ranks_are_forked_from_the_warm_server() -> None:
    """Only this test sees that the preload was lost: without it every rank imports torch anew."""
    assert os.getppid() == warm.SERVER
    assert torch.get_num_threads() == 1


@ranks(2)
def _raises_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the bug itself")
    dist.barrier()  # fails too, later: its peer is gone


@ranks(2)
def _dies_on_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


@ranks(2, timeout_s=1.0)
def _hangs_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


@ranks(2)
def _warns() -> None:
    warnings.warn("look here", UserWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (_raises_on_one, r"(?s)rank 1 of 2 failed first:\n.*ValueError: the bug itself"),
        (_dies_on_one, r"ranks of 2 that died without a word, with exit codes: \{1: 7\}"),
        (_hangs_on_one, r"ranks \[0, 1\] of 2 still running after 1.0 s"),
        (_warns, r"(?s)of 2 failed first:\n.*UserWarning: look here"),
    ],
)
def test_a_rank_that_fails_is_named(body, text: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=text):
        body()


@ranks(2)
def _skips() -> None:
    pytest.skip("no such device")


def test_a_skip_on_the_ranks_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="no such device"):
        _skips()
