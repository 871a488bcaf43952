"""Every format that is written gives back what went in, in any boxes, and others can read it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatree.io.checkpoint import Leaf
from megatree.io.formats import dcp, hf, native, orbax
from megatree.io.formats.arrays import Array, Reader, Writer, box_shape, copy, grid
from tests.io.formats.in_memory import InMemory, all_of, assert_same, samples

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
SMALL = 50  # bytes of a box: every tensor is cut


def _native(folder: Path, arrays: Mapping[str, Array]) -> Writer:
    leaves = {
        path: Leaf(path=path, shape=a.shape, dtype=a.dtype, axes=" ".join("_" for _ in a.shape))
        for path, a in arrays.items()
    }
    return native.NativeWriter(folder, leaves, {"step": 3}, SMALL)


WRITERS: dict[str, Callable[[Path, Mapping[str, Array]], Writer]] = {
    "native": _native,
    "safetensors": lambda folder, arrays: hf.hf_writer(folder, arrays, {}, shard_bytes=200),
    "dcp": dcp.DcpWriter,
    "orbax": lambda folder, arrays: orbax.OrbaxWriter(folder, arrays, SMALL),
}
READERS: dict[str, Callable[[Path], Reader]] = {
    "native": native.NativeReader,
    "safetensors": hf.HfReader,
    "dcp": dcp.DcpReader,
    "orbax": orbax.OrbaxReader,
}


def written(kind: str, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    reader = InMemory(tensors)
    copy(reader, WRITERS[kind](folder, reader.arrays), most_bytes=SMALL)
    return folder


@pytest.mark.parametrize("kind", WRITERS)
def test_what_goes_in_comes_out_in_any_box(kind: str, tmp_path: Path) -> None:
    tensors = samples()
    reader = READERS[kind](written(kind, tmp_path, tensors))
    assert_same(all_of(reader), tensors)
    box = ((1, 4), (1, 3), (2, 4))
    assert torch.equal(reader.read("params.a", box), tensors["params.a"][1:4, 1:3, 2:4])


def test_boxes_of_the_grid_are_small_and_cover_each_element_once() -> None:
    array = Array(shape=(4, 6, 8), dtype=torch.float32)
    seen = torch.zeros(array.shape, dtype=torch.int64)
    for box in grid(array, 70):
        part = seen[tuple(slice(*edge) for edge in box)]
        part += 1
        assert part.numel() * 4 <= 70
    assert seen.unique().tolist() == [1]
    assert box_shape(Array(shape=(), dtype=torch.int64)) == ()


def test_torch_loads_what_we_write(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as theirs

    tensors = samples()
    written("dcp", tmp_path, tensors)
    got = {path: torch.full_like(x, 9) for path, x in tensors.items()}
    theirs.load(got, checkpoint_id=tmp_path, no_dist=True)
    assert_same(got, tensors)


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as theirs

    tensors = samples()
    theirs.save({**tensors, "note": [1, "two"]}, checkpoint_id=tmp_path, no_dist=True)
    reader = dcp.DcpReader(tmp_path)
    assert_same(all_of(reader), tensors)
    assert reader.blob("note") == [1, "two"]


def test_safetensors_of_theirs_reads_what_we_write(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = samples()
    written("safetensors", tmp_path, tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert_same({k: x for file in files for k, x in load_file(file).items()}, tensors)
