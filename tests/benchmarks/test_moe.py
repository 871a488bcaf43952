"""The benchmark of a mixture runs, and all that it times does the same work."""

from dataclasses import replace

import torch

from benchmarks import moe


def test_all_ways_give_the_same_result() -> None:
    """Also that a row which fails says so and loses no other."""
    device = torch.device("cpu")
    shape = moe.tiny(moe.SHAPES["8-top-2"])
    shape = replace(shape, ways=(*shape.ways, "unknown"))
    *rows, failed = moe.measure("8-top-2", shape, device, steps=1, rounds=1)
    assert [row["row"] for row in rows] == ["megatree", "grouped", "loop", "hugging face"]
    for row in rows:
        assert row["distance"] < 1e-5, row
        assert row["ms"] > 0.0
    assert failed["error"] == "KeyError: 'unknown'"
    assert "ms" not in failed


def test_a_slow_or_wrong_layer_is_told() -> None:
    rows = [
        {"shape": "s", "row": "megatree", "of_control": 1.2, "distance": 0.0},
        {"shape": "s", "row": "megatree, compiled", "of_control": 1.1, "distance": float("nan")},
    ]
    wrong = moe.check(rows)
    assert wrong == [
        "s: megatree, compiled: distance nan (at most 0.15)",
        "s: 1.100 of the control (at most 1.0)",
    ]
    assert moe.check([{**rows[0], "of_control": 0.9}]) == []
