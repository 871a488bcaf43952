"""Chunk files that are not what was written: the error names leaf and file."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from megatree.io.checkpoint import Piece, load, read_manifest, save
from megatree.io.world import World

ONE = World.single()
FIX = "Load another checkpoint, or restore these files from a copy."


@pytest.fixture
def saved(tmp_path) -> Path:
    """a.w is bytes 0 to 256 of the file in 4 blocks, b.w bytes 256 to 384 in 2."""
    save(tmp_path / "c", [*wanted(1.0)], world=ONE, block_bytes=64)
    assert [str(stored.chunks[0]) for stored in read_manifest(tmp_path / "c").leaves] == [
        "[0:16, 0:4] rank_00000.bin 0+256",
        "[0:32] rank_00000.bin 256+128",
    ]
    return tmp_path / "c"


def wanted(value: float = 0.0) -> list[Piece]:
    return [
        Piece.whole("a.w", torch.full((16, 4), value), "ffn embed"),
        Piece.whole("b.w", torch.full((32,), value), "embed"),
    ]


def damaged(directory: Path, *problems: str):
    lines = "".join(f"  {problem}\n" for problem in problems)
    text = f"{directory}: the checkpoint is damaged.\n{lines}{FIX}"
    return pytest.raises(ValueError, match=f"^{re.escape(text)}$")


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_a_flipped_bit_is_named_by_leaf_file_and_block(saved):
    flip(saved / "rank_00000.bin", 256 + 70)
    with pytest.raises(ValueError, match="the checkpoint is damaged") as caught:
        load(saved, wanted(), world=ONE)
    (line,) = str(caught.value).splitlines()[1:-1]
    assert re.fullmatch(
        r"  b\.w: rank_00000\.bin bytes 320 to 384 have checksum 0x[0-9a-f]{8}, "
        r"the manifest says 0x[0-9a-f]{8}",
        line,
    )


def test_every_flipped_bit_of_a_small_checkpoint_is_seen(saved):
    file = saved / "rank_00000.bin"
    good = file.read_bytes()
    for at in range(0, len(good), 7):
        flip(file, at)
        with pytest.raises(ValueError, match="a.w" if at < 256 else "b.w"):
            load(saved, wanted(), world=ONE)
        file.write_bytes(good)
    assert load(saved, wanted(), world=ONE).bytes_read == 384


def test_a_partial_read_verifies_its_own_blocks_and_no_others(saved):
    """Only here: damage outside of what is wanted is not read, damage inside is never missed."""
    flip(saved / "rank_00000.bin", 200)
    top = Piece(
        path="a.w", shape=(16, 4), dtype=torch.float32, axes="ffn embed", box=((0, 12), (1, 3))
    )
    loaded = load(saved, [top], world=ONE, allow_extra=("b.w",))
    assert loaded.bytes_read == 192
    assert loaded.pieces[0].tensor.eq(1.0).all()
    bottom = Piece(
        path="a.w", shape=(16, 4), dtype=torch.float32, axes="ffn embed", box=((11, 13), (1, 3))
    )
    with pytest.raises(ValueError, match=r"a\.w: rank_00000\.bin bytes 192 to 256 have checksum"):
        load(saved, [bottom], world=ONE, allow_extra=("b.w",))


def test_a_truncated_file_names_the_leaves_that_were_cut(saved):
    os.truncate(saved / "rank_00000.bin", 300)
    with damaged(saved, "b.w: rank_00000.bin has 300 bytes, the manifest says 384"):
        load(saved, wanted(), world=ONE)
    os.truncate(saved / "rank_00000.bin", 0)
    with damaged(
        saved,
        "a.w: rank_00000.bin has 0 bytes, the manifest says 384",
        "b.w: rank_00000.bin has 0 bytes, the manifest says 384",
    ):
        load(saved, wanted(), world=ONE)


def test_a_file_with_more_bytes_than_declared_is_not_the_one_written(saved):
    with open(saved / "rank_00000.bin", "ab") as stream:
        stream.write(b"\0")
    with damaged(
        saved,
        "a.w: rank_00000.bin has 385 bytes, the manifest says 384",
        "b.w: rank_00000.bin has 385 bytes, the manifest says 384",
    ):
        load(saved, wanted(), world=ONE)


def test_a_missing_rank_file_names_its_leaves(tmp_path, run_ranks):
    pieces = wanted(1.0)
    run_ranks(2, lambda world: save(tmp_path / "c", [pieces[world.rank]], world=world))
    (tmp_path / "c" / "rank_00001.bin").unlink()
    with damaged(tmp_path / "c", "b.w: rank_00001.bin is missing"):
        load(tmp_path / "c", wanted(), world=ONE)


def test_a_link_in_place_of_a_file_is_not_followed(saved, tmp_path):
    file = saved / "rank_00000.bin"
    file.rename(tmp_path / "elsewhere.bin")
    file.symlink_to(tmp_path / "elsewhere.bin")
    with damaged(
        saved,
        "a.w: rank_00000.bin is not a regular file",
        "b.w: rank_00000.bin is not a regular file",
    ):
        load(saved, wanted(), world=ONE)


def test_a_read_error_names_leaf_and_file(saved, monkeypatch):
    def preadv(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    with damaged(
        saved,
        "b.w: rank_00000.bin bytes 256 to 320 cannot be read (Input/output error)",
        "b.w: rank_00000.bin bytes 320 to 384 cannot be read (Input/output error)",
    ):
        load(saved, [wanted()[1]], world=ONE, allow_extra=("a.w",))


def test_a_file_that_shrinks_while_it_is_read_is_damage(saved, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ValueError, match=r"b\.w: rank_00000\.bin bytes 256 to 320 have checksum"):
        load(saved, wanted(), world=ONE)


def test_short_reads_and_short_writes_are_continued(tmp_path, monkeypatch):
    """Only here: the kernel may move fewer bytes than asked, on a signal or a full pipe."""
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:5]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:3], at))
    array = torch.arange(40.0)
    save(tmp_path / "c", [Piece.whole("w", array, "embed")], world=ONE, block_bytes=64)
    loaded = load(tmp_path / "c", [Piece.whole("w", torch.zeros(40), "embed")], world=ONE)
    assert torch.equal(loaded.pieces[0].tensor, array)


def test_damage_that_one_rank_sees_is_raised_on_all(saved, run_ranks):
    flip(saved / "rank_00000.bin", 0)
    outcomes = run_ranks(2, lambda world: load(saved, [wanted()[world.rank]], world=world))
    assert [type(outcome) for outcome in outcomes] == [ValueError, ValueError]
    assert str(outcomes[1]) == f"rank 0: {outcomes[0]}"


def test_a_full_disk_leaves_nothing_and_names_the_file(tmp_path, run_ranks, monkeypatch):
    save(tmp_path / "step_00000001", wanted(1.0), world=ONE)

    def pwrite(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    pieces = wanted(2.0)
    outcomes = run_ranks(
        2, lambda world: save(tmp_path / "step_00000002", pieces[:1][world.rank :], world=world)
    )
    assert [type(outcome) for outcome in outcomes] == [OSError, OSError]
    assert re.search(
        r"rank_00000\.bin: cannot write its 256 bytes \(No space left on device\)\. Make room, "
        r"or save to a directory that every rank sees and may write; earlier checkpoints are "
        r"intact\.$",
        str(outcomes[0]),
    )
    assert str(outcomes[1]) == f"rank 0: {outcomes[0]}"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
