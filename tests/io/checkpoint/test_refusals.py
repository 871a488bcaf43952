"""What save and load refuse, by the text of the error; nothing of it is ever repaired silently."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.io.checkpoint import Piece, load, save
from megatree.io.world import World

ONE = World.single()


def refused(text: str):
    return pytest.raises(ValueError, match=f"^{re.escape(text)}$")


def piece(**changed: Any) -> Piece:
    made: dict[str, Any] = {
        "path": "blocks.k",
        "shape": (4, 8),
        "dtype": torch.float32,
        "axes": "kv_heads embed",
        "box": ((0, 2), (0, 8)),
    }
    return Piece(**(made | changed))


PIECES: dict[str, tuple[dict[str, Any], str]] = {
    "no name": (
        {"path": ""},
        "Leaf: the path is empty. Name the leaf, for example 'blocks.wq'.",
    ),
    "axes": (
        {"axes": "kv_heads"},
        "blocks.k: axes 'kv_heads' name 1 dims, the shape (4, 8) has 2. "
        "Give one axis name for each dim.",
    ),
    "negative": (
        {"shape": (4, -8)},
        "blocks.k: shape (4, -8) has a negative size. Correct it.",
    ),
    "box outside": (
        {"box": ((2, 5), (0, 8))},
        "blocks.k: box [2:5, 0:8] is not inside the shape (4, 8). "
        "Give 0 <= start <= stop <= size for each dim.",
    ),
    "box of other dims": (
        {"box": ((0, 4),)},
        "blocks.k: box [0:4] is not inside the shape (4, 8). "
        "Give 0 <= start <= stop <= size for each dim.",
    ),
    "padded data": (
        {"data": torch.zeros(3, 8)},
        "blocks.k: the data is float32 (3, 8), the box [0:2, 0:8] needs float32 (2, 8). "
        "Pass this rank's part of the unpadded array.",
    ),
    "other dtype": (
        {"data": torch.zeros(2, 8, dtype=torch.bfloat16)},
        "blocks.k: the data is bfloat16 (2, 8), the box [0:2, 0:8] needs float32 (2, 8). "
        "Pass this rank's part of the unpadded array.",
    ),
    "meta": (
        {"data": torch.zeros(2, 8, device="meta")},
        "blocks.k: the data has no bytes to read or write (layout torch.strided, device meta). "
        "Pass a dense tensor on a real device.",
    ),
}


@pytest.mark.parametrize("case", PIECES)
def test_a_wrong_piece_is_refused(case):
    changed, text = PIECES[case]
    with refused(text):
        piece(**changed)


def test_a_dtype_without_a_name_in_the_format_is_refused():
    with pytest.raises(
        ValueError, match=r"^blocks\.k: a checkpoint cannot hold torch\.complex32\. "
    ):
        piece(dtype=torch.complex32)


EXTRAS = {
    "object": ({"lr": torch.tensor(1.0)}, "extra.lr: a value of type Tensor."),
    "deep": ({"data": [{"at": {1, 2}}]}, "extra.data.0.at: a value of type set."),
    "key": ({"layers": {3: "x"}}, "extra.layers: the key 3 is int."),
    "large": ({"rng": 2**64}, "extra.rng: an integer of 65 bits."),
    "numpy": ({"step": torch.tensor(3).numpy()[()]}, "extra.step: a value of type int64."),
}


@pytest.mark.parametrize("case", EXTRAS)
def test_extra_that_would_not_come_back_is_refused(tmp_path, case):
    extra, text = EXTRAS[case]
    fix = "Use None, bool, int of 64 bits, float, str, bytes, lists, and dicts with str keys."
    with refused(f"{text} {fix}"):
        save(tmp_path / "c", [], world=ONE, extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_extra_nested_without_bound_is_refused(tmp_path):
    deep: list = []
    for _ in range(70):
        deep = [deep]
    with pytest.raises(ValueError, match="more than 64 containers inside each other"):
        save(tmp_path / "c", [], world=ONE, extra={"x": deep})


def test_extra_that_differs_between_ranks_is_refused(tmp_path, run_ranks):
    """Only here: rank 0's data position would silently become everyone's."""

    def go(world):
        extra = {"step": 3, "data": {"a": 1, "b": [world.rank]}, "same": [1]}
        save(tmp_path / "c", [], world=world, extra=extra)

    text = (
        f"{tmp_path / 'c'}: extra is not the same on every rank, it differs in data. "
        "Give what the whole job shares; arrays that differ by rank are pieces."
    )
    assert [str(outcome) for outcome in run_ranks(2, go)] == [text, text]


def test_dicts_in_another_order_are_the_same_extra(tmp_path, run_ranks):
    extras = [{"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}]
    outcomes = run_ranks(
        2, lambda world: save(tmp_path / "c", [], world=world, extra=extras[world.rank])
    )
    assert outcomes == [None, None]


def test_save_needs_data_and_aligned_blocks(tmp_path):
    with refused("blocks.k: the piece has no data. Pass it with data=."):
        save(tmp_path / "c", [piece()], world=ONE)
    with refused("save: block_bytes is 100. Give a positive multiple of 64, at most 1073741824."):
        save(tmp_path / "c", [], world=ONE, block_bytes=100)


def test_an_existing_checkpoint_is_never_replaced(tmp_path):
    save(tmp_path / "c", [], world=ONE, extra={"step": 1})
    before = (tmp_path / "c" / "manifest.msgpack").read_bytes()
    text = (
        f"{tmp_path / 'c'}: this checkpoint exists already, and a save never replaces one. "
        "Remove it first, or save to another directory."
    )
    with refused(text):
        save(tmp_path / "c", [], world=ONE, extra={"step": 2})
    assert (tmp_path / "c" / "manifest.msgpack").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_one_wrong_rank_fails_the_save_on_all(tmp_path, run_ranks):
    def go(world):
        data = torch.zeros(2, 8) if world.rank == 0 else None
        save(tmp_path / "c", [piece(data=data)], world=world)

    text = "blocks.k: the piece has no data. Pass it with data=."
    assert list(map(str, run_ranks(2, go))) == [f"rank 1: {text}", text]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path) -> Path:
    pieces = [
        Piece.whole("blocks.k", torch.arange(32.0).reshape(4, 8), "kv_heads embed"),
        Piece.whole("blocks.q", torch.arange(32.0).reshape(4, 8), "heads embed"),
        Piece.whole("opt.step", torch.tensor(7), ""),
    ]
    save(tmp_path / "c", pieces, world=ONE)
    return tmp_path / "c"


def test_every_leaf_that_does_not_match_is_listed_with_its_difference(saved):
    targets = [
        Piece.whole("blocks.k", torch.zeros(4, 6), "kv_heads embed"),
        Piece.whole("blocks.q", torch.zeros(4, 8, dtype=torch.bfloat16), "embed heads"),
        Piece.whole("blocks.w", torch.zeros(4), "embed"),
    ]
    text = f"""{saved}: 4 leaves do not match the target.
  blocks.k: shape (4, 8) in the checkpoint, (4, 6) in the target
  blocks.q: dtype float32 in the checkpoint, bfloat16 in the target, axes 'heads embed' in the \
checkpoint, 'embed heads' in the target
  blocks.w: not in the checkpoint
  opt.step: in the checkpoint, wanted by no rank
Build the target from the config that was saved with the checkpoint, or name in allow_missing= and \
allow_extra= what may differ."""
    with refused(text):
        load(saved, targets, world=ONE)
    assert all(not target.tensor.any() for target in targets)


def test_swapped_axes_of_a_square_leaf_are_refused(tmp_path):
    """Only here: shapes agree, so nothing else sees a transposed weight."""
    save(tmp_path / "c", [Piece.whole("w", torch.zeros(4, 4), "ffn embed")], world=ONE)
    text = (
        f"{tmp_path / 'c'}: 1 leaf does not match the target.\n"
        "  w: axes 'ffn embed' in the checkpoint, 'embed ffn' in the target\n"
        "Build the target from the config that was saved with the checkpoint."
    )
    with refused(text):
        load(
            tmp_path / "c",
            [Piece.whole("w", torch.zeros(4, 4), "embed ffn")],
            world=ONE,
            allow_missing=("*",),
            allow_extra=("*",),
        )


def test_a_long_list_stops_at_eight(saved):
    targets = [Piece.whole(f"new.{i}", torch.zeros(()), "") for i in range(12)]
    with pytest.raises(ValueError, match="12 leaves do not match the target") as caught:
        load(saved, targets, world=ONE, allow_extra=("*",))
    assert str(caught.value).splitlines()[9] == "  and 4 more"


def test_only_named_patterns_may_be_missing_or_extra_and_both_are_reported(saved):
    k = Piece.whole("blocks.k", torch.zeros(4, 8), "kv_heads embed")
    fresh = Piece.whole("head.bias", torch.full((3,), 5.0), "vocab")
    unmade = Piece(path="head.w", shape=(3,), dtype=torch.float32, axes="vocab", box=((0, 3),))
    loaded = load(
        saved,
        [fresh, k, unmade],
        world=ONE,
        allow_missing=("head.*",),
        allow_extra=("opt.*", "blocks.[pq]"),
    )
    assert loaded.missing == ("head.bias", "head.w")
    assert loaded.extra == ("blocks.q", "opt.step")
    assert loaded.pieces[0].tensor.tolist() == [5.0] * 3
    assert torch.equal(loaded.pieces[1].tensor, torch.arange(32.0).reshape(4, 8))
    assert loaded.pieces[2].data is None
    with pytest.raises(ValueError, match=r"opt\.step: in the checkpoint, wanted by no rank"):
        load(saved, [k], world=ONE, allow_extra=("blocks.*",))
    with refused("load: the patterns are the string 'opt.*'. Give a tuple of them."):
        load(saved, [k], world=ONE, allow_extra="opt.*")


def test_a_directory_without_a_checkpoint_says_so(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        text = (
            f"{path}: there is no checkpoint here, the file manifest.msgpack is missing. "
            "Give the directory of one step, for example the one that latest() returns."
        )
        with refused(text):
            load(path, [], world=ONE)
