"""docs/checkpoint-format.md is true: its example bytes, and its reader that is not ours."""

import re
from pathlib import Path

import pytest
import torch

from megatree.io.checkpoint import Leaf, Piece, read_manifest, save
from megatree.io.checkpoint.box import slices, whole
from megatree.io.checkpoint.dtypes import DTYPES
from megatree.io.world import World

DOCUMENT = Path(__file__).parents[3] / "docs" / "checkpoint-format.md"


@pytest.fixture(scope="module")
def document() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def dumped(document: str, file: str) -> bytes:
    """Return the bytes of a hex dump in the document."""
    dump = re.search(rf"^{re.escape(file)}:\n\n```\n(.*?)```", document, re.DOTALL | re.MULTILINE)
    assert dump is not None
    return bytes.fromhex("".join(line[10:58] for line in dump[1].splitlines()))


def test_the_bytes_of_the_example_are_those_that_save_writes(document, tmp_path):
    """Format version 1 is frozen: if this fails, the change needs a new version."""
    array = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.bfloat16)
    pieces = [
        Piece.whole("opt.count", torch.tensor(20), ""),
        Piece.whole("blocks.w", array, "ffn embed"),
    ]
    save(tmp_path / "c", pieces, world=World.single(), extra={"step": 20})
    for file in ("manifest.msgpack", "rank_00000.bin"):
        assert (tmp_path / "c" / file).read_bytes() == dumped(document, file)


def test_the_reader_of_the_document_reads_what_ranks_wrote(document, tmp_path, run_ranks):
    """An oracle that shares no code with the package."""
    source = re.search(r"^```python\n(.*?)```", document, re.DOTALL | re.MULTILINE)
    assert source is not None
    scope: dict = {}
    exec(source[1], scope)
    generator = torch.Generator().manual_seed(0)
    arrays = {
        name: torch.randint(0, 2, (9, 10 * dtype.itemsize), generator=generator)
        .to(torch.uint8)
        .view(dtype)
        for name, dtype in DTYPES.items()
    } | {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4)}

    def piece(name: str, rank: int) -> Piece:
        array = arrays[name]
        axes = " ".join(["ffn", "embed"][: array.ndim])
        leaf = Leaf(path=name, shape=tuple(array.shape), dtype=array.dtype, axes=axes)
        frame = whole(leaf.shape)
        cut = (frame, ((0, 9), (0, 3)), ((0, 9), (3, 10)))[rank if array.numel() > 1 else 0]
        return Piece(
            path=name,
            shape=leaf.shape,
            dtype=leaf.dtype,
            axes=axes,
            box=cut,
            data=array[slices(cut, frame)],
        )

    outcomes = run_ranks(
        2,
        lambda world: save(
            tmp_path / "c",
            [piece(name, world.rank + 1) for name in arrays],
            world=world,
            extra={"mix": [1, None]},
            block_bytes=64,
        ),
    )
    assert outcomes == [None, None]
    found, extra = scope["read_checkpoint"](tmp_path / "c")
    assert extra == {"mix": [1, None]}
    assert sorted(found) == sorted(arrays)
    for name, (dtype, axes, raw) in found.items():
        array = arrays[name]
        assert (DTYPES[dtype], raw.shape) == (array.dtype, tuple(array.shape))
        assert len(axes.split()) == array.ndim
        assert raw.tobytes() == array.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_key_that_is_written_and_every_dtype_is_in_the_document(document, tmp_path):
    save(tmp_path / "c", [Piece.whole("w", torch.zeros(1), "embed")], world=World.single())
    for name in DTYPES:
        assert re.search(rf"\b{name}\b", document)
    (stored,) = read_manifest(tmp_path / "c").leaves
    keys = ["format", "version", "crc32", "body", "block_bytes", "files", "leaves", "extra"]
    for key in [*keys, *vars(stored.leaf), "chunks", "box", "file", "offset", "nbytes"]:
        assert f"| `{key}` |" in document
