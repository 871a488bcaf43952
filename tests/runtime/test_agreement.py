"""Ranks that start with different things are refused, and the first difference is named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.io.world import World
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.agreement import check_agreement, code_facts, describe
from tests.thread_worlds import threaded_worlds


@dataclass(frozen=True)
class Part:
    seed: int
    name: str = "a"


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    sizes: dict[str, int]


def told(*facts: dict[str, str]) -> list[str | None]:
    """Return what every rank is told about its facts."""
    worlds = threaded_worlds(len(facts))

    def body(comm: ThreadComm) -> str | None:
        try:
            check_agreement(worlds[comm.rank], facts[comm.rank])
        except ValueError as error:
            return str(error)
        return None

    return Threads({"dp": len(facts)}).run(body)


def test_a_config_is_flat() -> None:
    whole = Whole((Part(1), Part(2, "b")), {"x": 3})
    assert describe(whole) == {
        "parts.0.seed": "1",
        "parts.0.name": "'a'",
        "parts.1.seed": "2",
        "parts.1.name": "'b'",
        "sizes.x": "3",
    }


def test_equal_facts_pass() -> None:
    assert told({"a": "1"}, {"a": "1"}) == [None, None]
    check_agreement(World.single(), {"a": "1"})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            ({"seed": "1", "b": "2"}, {"seed": "1", "b": "2"}, {"seed": "7", "b": "3"}),
            "start: seed is 7 on rank 2 and 1 on rank 0. Start every rank with the same",
        ),
        (({"a": "1", "b": "2"}, {"a": "1"}), "start: b is (absent) on rank 1 and 2 on rank 0."),
    ],
)
def test_the_first_difference_is_named_on_all_ranks(facts: Any, message: str) -> None:
    for text in told(*facts):
        assert text is not None
        assert text.startswith(message)


def test_a_file_of_code_that_differs_is_named(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "x.py").write_text("x = 1\n")
        (tmp_path / folder / "a.py").write_text(f"name = {len(folder)}\n")
    (tmp_path / "two" / "sub" / "x.py").write_text("x = 2\n")
    text = told(code_facts(tmp_path / "one"), code_facts(tmp_path / "two"))[1]
    assert text is not None
    assert text.startswith("start: code.sub/x.py is ")
    assert code_facts()["code.torch"] == torch.__version__
    assert "code.runtime/agreement.py" in code_facts()
