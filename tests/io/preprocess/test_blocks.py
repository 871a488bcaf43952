"""Blocks lose no byte, number lines truly, and hold no line that is too long."""

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from megatree.io.preprocess.blocks import BadLine, Block, Unit, read_blocks
from megatree.io.preprocess.compressed import compressed_writer


def whole_blocks(path: Path, **options: Any) -> list[Block]:
    """The blocks of a file without lines that are too long."""
    blocks = list(read_blocks(path, **options))
    good = [one for one in blocks if isinstance(one, Block)]
    assert len(good) == len(blocks)
    return good


HERE = hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@hypothesis.given(
    data=st.lists(st.sampled_from([b"\n", b"a", b" \n", b"\r\n", b"bcd"]), max_size=60).map(
        b"".join
    ),
    block_bytes=st.integers(1, 20),
    unit=st.sampled_from(["line", "paragraph", "file"]),
)
@HERE
def test_blocks_are_the_file_cut_between_units(
    tmp_path: Path, data: bytes, block_bytes: int, unit: Unit
) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    blocks = whole_blocks(path, unit=unit, block_bytes=block_bytes, max_line_bytes=1000)
    assert b"".join(block.data for block in blocks) == data
    read = b""
    for block in blocks:
        assert block.first_line == read.count(b"\n") + 1
        read += block.data
        assert read == data or read.endswith(b"\n")
        if unit == "paragraph" and read != data:
            assert not read[: len(read) - 1].rpartition(b"\n")[2].strip(), "a blank line"


@hypothesis.given(lengths=st.lists(st.integers(0, 30), max_size=12), block_bytes=st.integers(1, 40))
@HERE
def test_lines_that_are_too_long_are_reported_once_and_the_others_kept(
    tmp_path: Path, lengths: list[int], block_bytes: int
) -> None:
    """A line just over the bound may come within a block: whoever splits it checks it again."""
    path = tmp_path / "x"
    path.write_bytes(b"".join(b"x" * length + b"\n" for length in lengths))
    found = {}
    for one in read_blocks(path, block_bytes=block_bytes, max_line_bytes=10):
        if isinstance(one, BadLine):
            assert one.kind == "too long"
            assert one.line not in found
            found[one.line] = int(one.detail.split()[0]) - 1
        else:
            for line, raw in enumerate(one.data.split(b"\n")[:-1], one.first_line):
                assert line not in found
                found[line] = len(raw)
                assert len(raw) <= 20
    assert found == dict(enumerate(lengths, 1))


@pytest.mark.parametrize("block_bytes", range(1, 12))
def test_what_follows_a_paragraph_that_is_too_long_is_kept(
    tmp_path: Path, block_bytes: int
) -> None:
    """The blank line may be cut by the end of what is read at once."""
    (tmp_path / "x").write_bytes(b"a" * 30 + b"\n\nlast\n")
    found = list(
        read_blocks(tmp_path / "x", unit="paragraph", block_bytes=block_bytes, max_line_bytes=11)
    )
    bad, *blocks = found
    assert isinstance(bad, BadLine)
    assert bad.detail.startswith("32 bytes")
    assert b"".join(one.data for one in blocks if isinstance(one, Block)) == b"last\n"
    assert isinstance(blocks[0], Block)
    assert blocks[0].first_line == 3


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_a_line_of_gigabytes_takes_no_memory(tmp_path: Path, unit: Unit) -> None:
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"first\n\n")
        for _ in range(64):
            file.write(b"a" * (1 << 20))
        file.write(b"\n\nlast\n")
    tracemalloc.start()
    try:
        found = list(read_blocks(path, unit=unit, block_bytes=1 << 16, max_line_bytes=1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    _, bad, last = found
    assert isinstance(bad, BadLine)
    assert isinstance(last, Block)
    assert isinstance(last.data, bytes)
    assert (bad.line, bad.kind) == (3, "too long")
    assert bad.detail.startswith(str((64 << 20) + (1 if unit == "line" else 2)))
    assert last.data.strip() == b"last"
    assert last.first_line == (4 if unit == "line" else 5)
    assert peak < 8 << 20


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_files_are_read_whole_or_refused(tmp_path: Path, suffix: str) -> None:
    """A cut .zst once read as a shorter file."""
    path = tmp_path / f"x{suffix}"
    text = b"".join(b'{"text": "line %d"}\n' % number for number in range(20_000))
    with open(path, "wb") as raw, compressed_writer(path, raw) as stream:
        stream.write(text)
    whole = path.read_bytes()
    assert b"".join(one.data for one in whole_blocks(path)) == text
    path.write_bytes(whole + whole)  # streams laid end to end, as parallel compressors write
    assert b"".join(one.data for one in whole_blocks(path)) == text + text
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"x{suffix}: the compressed data ends too early"):
        list(read_blocks(path))
    path.write_bytes(b"plain text that is not compressed at all")
    with pytest.raises(ValueError, match=rf"x{suffix}: it is not what its suffix says"):
        list(read_blocks(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: No such file.*Name files that exist"):
        list(read_blocks(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"Is a directory"):
        list(read_blocks(tmp_path))
