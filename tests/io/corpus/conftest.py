"""Every command's work goes through pickle, as to a process of its own, without starting one."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from megatree.io.corpus import near, stream, wikipedia


@pytest.fixture(autouse=True)
def through_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (near, stream, wikipedia):
        monkeypatch.setattr(module, "ordered_map", pickled_map)


def pickled_map(fn: Callable, items: Iterable[Any], *, workers: int) -> Iterator[Any]:
    assert workers >= 1
    sent = pickle.dumps(fn)
    for item in items:
        result = pickle.loads(sent)(pickle.loads(pickle.dumps(item)))
        yield pickle.loads(pickle.dumps(result))
