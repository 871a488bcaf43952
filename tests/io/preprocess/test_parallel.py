"""Work spread over processes: in order, bounded ahead, and errors of workers are ours to tell."""

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from megatree.io.preprocess.parallel import ordered_map
from megatree.io.tokenizers import NullTokenizer
from megatree.runtime.refusals import refusal


def encoded(number: int) -> list[int]:
    return NullTokenizer(vocab_size=40, eod=0).encode(str(number))


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_and_little_is_read_ahead() -> None:
    read = []

    def items() -> Iterator[int]:
        for number in range(41):
            read.append(number)
            yield number

    results = ordered_map(encoded, items(), workers=2)
    assert next(results) == [0]
    assert len(read) <= 6
    assert [next(results) for _ in range(39)] == [[number] for number in range(1, 40)]
    with pytest.raises(ValueError, match=r"'40' is no id in 0..39") as raised:
        next(results)
    assert refusal(raised.value) is not None, "a user's error, not a bug of the pool"


def test_a_worker_that_dies_is_told() -> None:
    with pytest.raises(ChildProcessError, match=r"one of the processes died.*fewer than 2 workers"):
        list(ordered_map(die, range(3), workers=2))


def test_one_worker_is_this_process() -> None:
    assert list(ordered_map(partial(pow, 2), [1, 2], workers=1)) == [2, 4]
    assert set(ordered_map(lambda _: os.getpid(), [1], workers=1)) == {os.getpid()}
