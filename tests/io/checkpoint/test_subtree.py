"""Loading a part of the tree: its paths are those below, and the rest is nobody's concern."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.io.checkpoint import Piece, load, save
from megatree.io.world import World

ONE = World.single()
SHAPE = (16, 8)


def array(number: int) -> torch.Tensor:
    return torch.arange(128.0).reshape(SHAPE) + 1000 * number


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Parameters, moments and two leaves whose names only look as if they were below."""
    names = ("params.a.w", "params.b", "opt.m.a.w", "params2.a.w", "paramsa")
    held = [Piece.whole(name, array(k), "ffn embed") for k, name in enumerate(names)]
    save(tmp_path / "c", held, world=ONE)
    return tmp_path / "c"


def target(path: str) -> Piece:
    return Piece.whole(path, torch.zeros(SHAPE), "ffn embed")


def test_a_subtree_is_read_as_if_it_were_the_whole(saved: Path) -> None:
    loaded = load(saved, [target("a.w"), target("b")], world=ONE, subtree="params")
    assert [p.path for p in loaded.pieces] == ["a.w", "b"]
    assert torch.equal(loaded.pieces[0].tensor, array(0))
    assert torch.equal(loaded.pieces[1].tensor, array(1))
    assert (loaded.missing, loaded.extra, loaded.skipped) == ((), (), ())
    assert loaded.bytes_read == 2 * 128 * 4, "what is elsewhere is not read"
    (deep,) = load(saved, [target("w")], world=ONE, subtree="opt.m.a").pieces
    assert torch.equal(deep.tensor, array(2))


def test_a_subtree_is_read_under_any_cut(saved: Path, run_ranks: Callable[..., list[Any]]) -> None:
    def columns(world: World) -> bool:
        box = ((0, 16), (4 * world.rank, 4 * world.rank + 4))
        piece = Piece(path="w", shape=SHAPE, dtype=torch.float32, axes="ffn embed", box=box)
        (piece,) = load(saved, [piece], world=world, subtree="params.a").pieces
        return torch.equal(piece.tensor, array(0)[:, slice(*box[1])])

    assert run_ranks(2, columns) == [True, True]


def test_a_subtree_is_strict_about_itself_and_patterns_are_below_it(saved: Path) -> None:
    wrong = r"c: params: 2 leaves do not match the target.*\n.*b: in the .*\n.*c: not in the check"
    with pytest.raises(ValueError, match=wrong):
        load(saved, [target("a.w"), target("c")], world=ONE, subtree="params")
    loaded = load(
        saved, [target("a.w"), target("c")], world=ONE, subtree="params", allow_missing=["c"],
        allow_extra=["b"],
    )  # fmt: skip
    assert (loaded.missing, loaded.extra) == (("c",), ("b",))


def test_a_subtree_that_is_not_there_has_no_leaf(saved: Path) -> None:
    """Not the start of a name, and not a leaf."""
    for place in ("para", "nothing", "params.a.w"):
        with pytest.raises(
            ValueError, match=rf"c: {place}: 1 leaf does [^\n]*\n  w: not in the chec"
        ):
            load(saved, [target("w")], world=ONE, subtree=place)
