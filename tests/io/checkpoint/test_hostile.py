"""Checkpoints made to hurt whoever loads them: no hang, no memory on a lie, nothing outside."""

import os
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from megatree.io.checkpoint import Piece, latest, load, read_manifest, save
from megatree.io.checkpoint.extra import packed
from megatree.io.checkpoint.parse import decode
from megatree.io.world import World

ONE = World.single()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "c", [Piece.whole("w", torch.ones(64), "embed")], world=ONE, block_bytes=64)
    return tmp_path / "c"


def envelope(body: bytes) -> bytes:
    return packed(
        {"format": "megatree-checkpoint", "version": 1, "crc32": zlib.crc32(body), "body": body}
    )


def body_of(**changed: Any) -> bytes:
    return packed({"block_bytes": 64, "files": [], "leaves": [], "extra": {}} | changed)


def place_special(path: Path, kind: str, target: Path) -> None:
    path.unlink()
    if kind == "link":
        path.symlink_to(target)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "endless", "pipe", "directory"])
def test_a_manifest_that_is_no_file_is_not_read(saved: Path, tmp_path: Path, kind: str) -> None:
    """A pipe nobody writes to would wait for ever, a link to /dev/zero would fill the memory."""
    other = tmp_path / "other"
    other.write_bytes((saved / "manifest.msgpack").read_bytes())
    place_special(saved / "manifest.msgpack", kind, other)
    with pytest.raises(ValueError, match=r"the file manifest\.msgpack is not a regular file"):
        read_manifest(saved)


@pytest.mark.parametrize("kind", ["link", "endless", "pipe", "directory"])
def test_a_chunk_file_that_is_no_file_is_not_read(saved: Path, tmp_path: Path, kind: str) -> None:
    other = tmp_path / "other"
    other.write_bytes((saved / "rank_00000.bin").read_bytes())
    place_special(saved / "rank_00000.bin", kind, other)
    with pytest.raises(ValueError, match=r"w: rank_00000\.bin is not a regular file"):
        load(saved, [Piece.whole("w", torch.zeros(64), "embed")], world=ONE)


def test_a_link_among_the_checkpoints_is_followed_but_never_removed(tmp_path: Path) -> None:
    from megatree.io.checkpoint import Retention, Saver, step_name, steps_in

    elsewhere = tmp_path / "elsewhere"
    save(elsewhere / "c", [], world=ONE)
    run = tmp_path / "run"
    run.mkdir()
    (run / step_name(1)).symlink_to(elsewhere / "c")
    assert latest(run) == run / step_name(1)
    saver = Saver(ONE, retention=Retention(last=1))
    saver.save(run / step_name(2), [], step=2)
    assert list(steps_in(run)) == [2]
    assert (elsewhere / "c" / "manifest.msgpack").is_file()


HOSTILE = {
    "a deep body": (
        envelope(b"\x81\xa1x" + b"\x91" * 5000),
        "that are not one msgpack value",
    ),
    "a deep extra": (
        envelope(body_of()[:-1] + b"\x81\xa1x" + b"\x91" * 200 + b"\xc0"),
        "more than 64 containers inside each other",
    ),
    "an absurd count of leaves": (
        envelope(body_of().replace(b"\xa6leaves\x90", b"\xa6leaves\xdd\xff\xff\xff\xff")),
        "that are not one msgpack value",
    ),
    "an absurd length of text": (
        envelope(body_of().replace(b"\xa6leaves\x90", b"\xdb\xff\xff\xff\xff")),
        "that are not one msgpack value",
    ),
    "an absurd number of dims": (
        envelope(body_of(leaves=[{
            "path": "w", "shape": [2] * 100_000, "dtype": "int8", "axes": "", "chunks": []
        }])),
        "has 100000",
    ),
    "keys that are no text": (envelope(packed({1: 2})), "that are not one msgpack value"),
    "an extension type": (envelope(packed(msgpack.ExtType(5, b"x"))), "'block_bytes' is mi"),
    "elements beyond all memory": (
        envelope(body_of(leaves=[{
            "path": "w", "shape": [1 << 62, 1 << 62], "dtype": "int8", "axes": "a b", "chunks": []
        }])),
        "its chunks hold 0 of ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused_at_once_and_costs_nothing(case: str) -> None:
    raw, text = HOSTILE[case]
    tracemalloc.start()
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"^m: ") as caught:
        decode(raw, "m")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert text in str(caught.value)
    assert peak < 40 * len(raw) + (1 << 20)
    assert time.perf_counter() - begun < 5.0


def chunks_of(boxes: list[list[list[int]]]) -> list[dict[str, Any]]:
    return [
        {"box": box, "file": 0, "offset": 64 * k, "nbytes": 1, "crc32": b"0000"}
        for k, box in enumerate(boxes)
    ]


def many(boxes: list[list[list[int]]], shape: list[int]) -> bytes:
    leaf = {"path": "w", "shape": shape, "dtype": "int8", "axes": "a b", "chunks": chunks_of(boxes)}
    files = [{"name": "rank_00000.bin", "nbytes": 64 * len(boxes)}]
    return envelope(body_of(leaves=[leaf], files=files))


def test_many_chunks_are_checked_in_seconds() -> None:
    """A grid with a hole in it, and one with an overlap: no square of their number in time."""
    side = 40
    grid = [[[i, i + 1], [j, j + 1]] for i in range(side) for j in range(side)]
    begun = time.perf_counter()
    assert len(decode(many(grid, [side, side]), "m").leaves[0].chunks) == side * side
    hole = grid[: side * 20 + 7] + grid[side * 20 + 8 :]
    with pytest.raises(
        ValueError, match=r"w: its chunks hold 1599 of 1600 elements, none holds \["
    ):
        decode(many(hole, [side, side]), "m")
    twice = [*grid[:-1], grid[5]]
    with pytest.raises(ValueError, match=r"w: the chunks \[0:1, 5:6\] and \[0:1, 5:6\] overlap"):
        decode(many(twice, [side, side]), "m")
    assert time.perf_counter() - begun < 10.0  # pairs of them took a minute


def test_the_size_of_a_file_is_looked_at_before_memory_is_made(tmp_path: Path) -> None:
    """A manifest may ask for a block of a GiB; a file that is not there costs nothing."""
    body = body_of(
        block_bytes=1 << 30,
        files=[{"name": "rank_00000.bin", "nbytes": 1 << 30}],
        leaves=[{
            "path": "w", "shape": [1 << 30], "dtype": "int8", "axes": "a",
            "chunks": [{
                "box": [[0, 1 << 30]], "file": 0, "offset": 0, "nbytes": 1 << 30, "crc32": b"0000"
            }],
        }],
    )  # fmt: skip
    (tmp_path / "manifest.msgpack").write_bytes(envelope(body))
    (tmp_path / "rank_00000.bin").touch()
    target = Piece(path="w", shape=(1 << 30,), dtype=torch.int8, axes="a", box=((0, 4),))
    with pytest.raises(ValueError, match=r"w: rank_00000\.bin has 0 bytes, the manifest says 1073"):
        load(tmp_path, [target], world=ONE)
