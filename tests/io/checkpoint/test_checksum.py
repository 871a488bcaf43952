"""Whatever makes the checksums, they are zlib's."""

import random
import sys
import zlib

import pytest

from megatree.io.checkpoint import checksum


def test_checksums_are_those_of_zlib_however_the_bytes_are_cut() -> None:
    draw = random.Random(0)
    for size in (0, 1, 63, 64, 65, 1000, 70_000):
        raw = draw.randbytes(size)
        found, at = 0, 0
        while at < size:
            step = draw.randint(1, size)
            found, at = checksum.crc32(memoryview(raw)[at : at + step], found), at + step
        assert found == zlib.crc32(raw)


def test_without_the_fast_package_zlib_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    assert checksum._fastest() is zlib.crc32
