"""Manifests that lie: each is refused with place and reason, before any file is opened."""

import re
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch

from megatree.io.checkpoint import Piece, load, read_manifest, save
from megatree.io.checkpoint.extra import packed
from megatree.io.checkpoint.parse import decode
from megatree.io.world import World

FIX = "The manifest is damaged or was not written by megatree: load another checkpoint."


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """Two leaves in one file: blocks.k in bytes 0 to 128, opt.step in bytes 128 to 136."""
    path = tmp_path_factory.mktemp("parse") / "c"
    pieces = [
        Piece.whole("blocks.k", torch.zeros(4, 8), "kv_heads embed"),
        Piece.whole("opt.step", torch.tensor(7), ""),
    ]
    save(path, pieces, world=World.single(), extra={"step": 7}, block_bytes=64)
    return (path / "manifest.msgpack").read_bytes()


def rewritten(raw: bytes, change: Callable[[Any], Any]) -> bytes:
    """Return the manifest with a changed body under a right checksum."""
    envelope = msgpack.unpackb(raw)
    body = msgpack.unpackb(envelope["body"])
    raw = packed(change(body) or body)
    return packed(envelope | {"body": raw, "crc32": zlib.crc32(raw)})


def leaf(change: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda body: body["leaves"][0].update(change)


def chunk(change: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda body: body["leaves"][0]["chunks"][0].update(change)


def half(box: list, nbytes: int, offset: int) -> dict[str, Any]:
    return {"box": box, "file": 0, "offset": offset, "nbytes": nbytes, "crc32": b"0000"}


BODIES = {
    "parent directory": (
        lambda body: body["files"][0].update(name="../rank_00000.bin"),
        "the file name '../rank_00000.bin' is not rank_NNNNN.bin in the checkpoint's own directory",
    ),
    "absolute name": (
        lambda body: body["files"][0].update(name="/etc/passwd"),
        "the file name '/etc/passwd' is not rank_NNNNN.bin in the checkpoint's own directory",
    ),
    "name with a newline": (
        lambda body: body["files"][0].update(name="rank_00000.bin\n"),
        "the file name 'rank_00000.bin\\n' is not rank_NNNNN.bin in the checkpoint's own directory",
    ),
    "file twice": (
        lambda body: body["files"].append(body["files"][0]),
        "the file rank_00000.bin has 136 bytes or is listed twice",
    ),
    "no body": (lambda body: [1, 2], "the field 'block_bytes' is missing"),
    "no leaves": (lambda body: body.pop("leaves") and None, "the field 'leaves' is missing"),
    "leaves of another kind": (
        lambda body: body.update(leaves={}),
        "the field 'leaves' is dict, not list",
    ),
    "a bool for a number": (
        lambda body: body["files"][0].update(nbytes=True),
        "the field 'nbytes' is bool, not int",
    ),
    "no blocks": (
        lambda body: body.update(block_bytes=0),
        "block_bytes is 0, no positive multiple of 64 up to 1073741824",
    ),
    "blocks that fill the memory": (
        lambda body: body.update(block_bytes=1 << 40),
        "block_bytes is 1099511627776, no positive multiple of 64 up to 1073741824",
    ),
    "one path twice": (
        lambda body: body["leaves"].append(
            body["leaves"][0] | {"shape": [0], "axes": "embed", "chunks": []}
        ),
        "two leaves have the same path",
    ),
    "extra of another kind": (
        lambda body: body.update(extra=[]),
        "the field 'extra' is list, not dict",
    ),
    "size that is no number": (
        leaf({"shape": [4, "8"]}),
        "blocks.k: shape has a value that is no integer",
    ),
    "chunk in no file": (chunk({"file": 1}), "blocks.k: a chunk is in file 1 of 1"),
    "negative file": (chunk({"file": -1}), "blocks.k: a chunk is in file -1 of 1"),
    "unaligned": (
        chunk({"offset": 3}),
        "blocks.k: a chunk starts at byte 3, no multiple of 64",
    ),
    "negative offset": (
        chunk({"offset": -64}),
        "blocks.k: a chunk starts at byte -64, no multiple of 64",
    ),
    "past the end": (
        chunk({"offset": 1 << 40}),
        "a chunk of blocks.k ends at byte 1099511627904 of rank_00000.bin, which has 136",
    ),
    "bytes of another chunk": (
        chunk({"offset": 64}),
        "chunks of blocks.k and opt.step share bytes of rank_00000.bin",
    ),
    "lying size": (
        chunk({"nbytes": 1 << 50}),
        "blocks.k: a chunk of 128 bytes declares 1125899906842624",
    ),
    "missing checksums": (
        chunk({"crc32": b"0000"}),
        "blocks.k: a chunk of 2 blocks has 4 bytes of checksums",
    ),
    "box of other dims": (chunk({"box": [[0, 4]]}), "blocks.k: a box is not 2 pairs"),
    "box of triples": (chunk({"box": [[0, 4, 1], [0, 8, 1]]}), "blocks.k: a box is not 2 pairs"),
    "box outside": (
        chunk({"box": [[0, 5], [0, 8]]}),
        "blocks.k: the box [0:5, 0:8] is empty or not inside the shape (4, 8)",
    ),
    "empty box": (
        chunk({"box": [[2, 2], [0, 8]]}),
        "blocks.k: the box [2:2, 0:8] is empty or not inside the shape (4, 8)",
    ),
    "gap": (
        leaf({"shape": [1 << 60, 8]}),
        "blocks.k: its chunks hold 32 of 9223372036854775808 elements, none holds "
        "[4:1152921504606846976, 0:8]",
    ),
    "overlap": (
        leaf({"chunks": [half([[0, 3], [0, 5]], 60, 0), half([[2, 4], [0, 8]], 64, 64)]}),
        "blocks.k: the chunks [0:3, 0:5] and [2:4, 0:8] overlap",
    ),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_lying_body_is_refused_with_place_and_reason(good, case):
    change, problem = BODIES[case]
    text = f"run/manifest.msgpack: {problem}. {FIX}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        decode(rewritten(good, change), "run/manifest.msgpack")


def test_axes_that_do_not_fit_the_shape_are_refused(good):
    with pytest.raises(ValueError, match=r"blocks\.k: axes .embed. name 1 dims, the shape"):
        decode(rewritten(good, leaf({"axes": "embed"})), "m")


def test_a_dtype_this_torch_lacks_is_named(good):
    text = "m: blocks.k: this torch has no dtype 'float2'. Load it with the torch that wrote it."
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        decode(rewritten(good, leaf({"dtype": "float2"})), "m")


def test_keys_of_a_later_minor_addition_are_ignored(good):
    changed = rewritten(good, lambda body: body.update(comment="x"))
    assert decode(changed, "m") == decode(good, "m")


def test_a_later_version_is_refused_before_anything_else_is_read():
    raw = packed({"format": "megatree-checkpoint", "version": 2, "whatever": [1]})
    text = (
        "m: written in format version 2, this megatree reads up to 1. "
        "Load it with a newer megatree."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        decode(raw, "m")


ENVELOPES = {
    "empty": (b"", "0 bytes that are not one msgpack value (ValueError)"),
    "text": (b"step 20\n", "8 bytes that are not one msgpack value (ExtraData)"),
    "another value": (packed(3), "the field 'format' is missing"),
    "another format": (
        packed({"format": "zip"}),
        "the format is 'zip', not 'megatree-checkpoint'",
    ),
    "version 0": (
        packed({"format": "megatree-checkpoint", "version": 0}),
        "format version 0 was never written",
    ),
    "version of another kind": (
        packed({"format": "megatree-checkpoint", "version": "1"}),
        "the field 'version' is str, not int",
    ),
    "deep": (b"\x91" * 100_000, "100000 bytes that are not one msgpack value (StackError)"),
    "absurd count": (
        b"\xdd\xff\xff\xff\xff",
        "5 bytes that are not one msgpack value (ValueError)",
    ),
}


@pytest.mark.parametrize("case", ENVELOPES)
def test_garbage_is_refused(case):
    raw, problem = ENVELOPES[case]
    with pytest.raises(ValueError, match=f"^{re.escape(f'm: {problem}. {FIX}')}$"):
        decode(raw, "m")


def test_every_damaged_byte_of_a_manifest_is_seen(good):
    """Only here: no damaged byte may lead to anything but this error, or go unseen."""
    for at in range(len(good)):
        for flip in (1, 0x80):
            raw = bytearray(good)
            raw[at] ^= flip
            with pytest.raises(ValueError, match=r"^m: "):
                decode(bytes(raw), "m")
    for size in range(len(good)):
        with pytest.raises(ValueError, match=r"^m: "):
            decode(good[:size], "m")


def test_a_load_names_the_manifest_that_lies(tmp_path, good):
    (tmp_path / "manifest.msgpack").write_bytes(good[:-1])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'manifest.msgpack'}: ")):
        load(tmp_path, [], world=World.single())
    (tmp_path / "manifest.msgpack").write_bytes(good)
    assert [str(stored.leaf) for stored in read_manifest(tmp_path).leaves] == [
        "blocks.k float32 (4, 8) 'kv_heads embed'",
        "opt.step int64 () ''",
    ]
