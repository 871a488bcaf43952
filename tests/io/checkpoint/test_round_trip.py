"""What is saved under one cut of the arrays is loaded under any other, bit for bit."""

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatree.io.checkpoint import Leaf, Piece, load, load_extra, read_manifest, save
from megatree.io.checkpoint.box import Box, slices, volume, whole
from megatree.io.checkpoint.dtypes import DTYPES
from megatree.io.checkpoint.manifest import blocks_of
from megatree.io.world import World

AXES = "layers embed ffn"
BLOCK = 64  # bytes: small, so that chunks of a few elements have many blocks


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return every kind of bit pattern, NaNs and subnormals included; bools are 0 or 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def bits(data: torch.Tensor) -> bytes:
    return data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def piece_of(leaf: Leaf, box: Box, data: torch.Tensor | None = None) -> Piece:
    return Piece(
        path=leaf.path, shape=leaf.shape, dtype=leaf.dtype, axes=leaf.axes, box=box, data=data
    )


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back_bit_for_bit(tmp_path, name):
    arrays = [random_bits(shape, DTYPES[name]) for shape in ((), (5,), (3, 4), (0, 4))]
    pieces = [
        Piece.whole(f"a.{i}", array, " ".join(AXES.split()[: array.ndim]))
        for i, array in enumerate(arrays)
    ]
    save(tmp_path / "c", pieces, world=World.single())
    targets = [piece_of(piece.leaf, piece.box) for piece in pieces]
    loaded = load(tmp_path / "c", targets, world=World.single())
    for piece, array in zip(loaded.pieces, arrays, strict=True):
        assert (piece.tensor.dtype, piece.tensor.shape) == (array.dtype, array.shape)
        assert bits(piece.tensor) == bits(array)


STRIDES = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: torch.cat([x, x], 1).reshape(2 * x.shape[0], -1)[::2],
    "inside a larger tensor": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[3:-1, 1:-2],
    "a parameter": lambda x: torch.nn.Parameter(x.clone()),
}


@pytest.mark.parametrize("source", STRIDES)
@pytest.mark.parametrize("target", STRIDES)
def test_strides_and_parameters_do_not_show(tmp_path, source, target):
    array = torch.arange(117.0).reshape(9, 13)
    piece = Piece.whole("w", STRIDES[source](array), "ffn embed")
    assert torch.equal(piece.tensor, array)
    save(tmp_path / "c", [piece], world=World.single(), block_bytes=BLOCK)
    into = STRIDES[target](torch.zeros(9, 13))
    loaded = load(tmp_path / "c", [Piece.whole("w", into, "ffn embed")], world=World.single())
    assert loaded.pieces[0].tensor is into
    assert torch.equal(into, array)


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_copied_block_by_block(tmp_path):
    """Only here: neither side has memory that a file could be read into."""
    array = random_bits((300, 70), torch.bfloat16)
    box = ((3, 290), (1, 70))
    source = Piece.whole("w", array.cuda(), "ffn embed")
    save(tmp_path / "c", [source], world=World.single(), block_bytes=1 << 12)
    into = torch.zeros(69, 287, dtype=array.dtype, device="cuda").t()
    load(tmp_path / "c", [piece_of(source.leaf, box, into)], world=World.single())
    assert bits(into.cpu()) == bits(array[3:290, 1:70])


def test_a_conjugate_view_is_saved_resolved(tmp_path):
    """Only here: its memory holds the other sign."""
    array = torch.tensor([1 + 2j, 3 - 4j])
    save(tmp_path / "c", [Piece.whole("w", array.conj(), "embed")], world=World.single())
    target = Piece.whole("w", torch.zeros(2, dtype=array.dtype), "embed")
    load(tmp_path / "c", [target], world=World.single())
    assert target.tensor.tolist() == [1 - 2j, 3 + 4j]


def test_extra_comes_back_equal(tmp_path):
    extra = {
        "step": 20,
        "seed": 2**64 - 1,
        "rng": b"\x00\xff",
        "data": {"position": -3, "done": False, "next": None, "mix": [0.5, 1e300]},
        "name": "Zuerich",
    }
    save(tmp_path / "c", [], world=World.single(), extra=extra)
    assert load_extra(tmp_path / "c") == extra
    save(tmp_path / "d", [], world=World.single(), extra={"betas": (0.9, 0.95)})
    assert load_extra(tmp_path / "d") == {"betas": [0.9, 0.95]}
    save(tmp_path / "e", [], world=World.single())
    assert load_extra(tmp_path / "e") == {}


def test_equal_states_make_equal_files(tmp_path, run_ranks):
    """Two saves of one state are compared with cmp, so nothing of the moment may be in them."""
    leaf = Leaf(path="w", shape=(64, 4), dtype=torch.float32, axes="ffn embed")
    data = random_bits(leaf.shape, leaf.dtype)
    for name in "ab":
        run_ranks(
            3,
            lambda world, name=name: save(
                tmp_path / name,
                [piece_of(leaf, whole(leaf.shape), data)],
                world=world,
                extra={"step": 1},
                block_bytes=BLOCK,
            ),
        )
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["manifest.msgpack", "rank_00000.bin", "rank_00001.bin", "rank_00002.bin"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# Strategies make plain tuples: beartype, which checks the package's functions, draws from the
# global random state, and hypothesis forbids that inside a strategy.


@st.composite
def cuts(draw, box: Box, depth: int = 3) -> list[Box]:
    """Return disjoint boxes that cover `box`, cut unevenly again and again."""
    dims = [dim for dim, (start, stop) in enumerate(box) if stop - start > 1]
    if not dims or depth == 0 or draw(st.integers(0, 3)) == 0:
        return [box]
    dim = draw(st.sampled_from(dims))
    start, stop = box[dim]
    at = draw(st.integers(start + 1, stop - 1))
    halves = [(*box[:dim], edge, *box[dim + 1 :]) for edge in ((start, at), (at, stop))]
    return [part for half in halves for part in draw(cuts(half, depth - 1))]


@st.composite
def boxes(draw, box: Box) -> Box:
    """Return any box inside `box`, possibly empty."""
    edges = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for _, n in box]
    return tuple((start, stop) for start, stop in edges)


@st.composite
def leaf_cases(draw, num_savers: int, num_loaders: int):
    """Return shape, dtype name, (box, ranks that hold it) ..., and per loading rank its boxes."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    frame = tuple((0, size) for size in shape)
    ranks = st.sets(st.integers(0, num_savers - 1), min_size=1)
    held = [(box, draw(ranks)) for box in draw(cuts(frame))]
    kinds = st.one_of(
        st.just([frame]), cuts(frame), st.lists(boxes(frame), min_size=2, max_size=2), st.just([])
    )
    return shape, dtype, held, [draw(kinds) for _ in range(num_loaders)]


@st.composite
def cases(draw):
    """Return the number of saving and of loading ranks, and the leaves."""
    num_savers, num_loaders = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    drawn = draw(st.lists(leaf_cases(num_savers, num_loaders), min_size=1, max_size=3))
    return num_savers, num_loaders, drawn


def built(case):
    """Return arrays by path, per saving rank its pieces, per loading rank its (leaf, box) ..."""
    num_savers, num_loaders, drawn = case
    held: list[list[Piece]] = [[] for _ in range(num_savers)]
    wanted: list[list[tuple[Leaf, Box]]] = [[] for _ in range(num_loaders)]
    arrays = {}
    for i, (shape, dtype, parts, wants) in enumerate(drawn):
        axes = " ".join(AXES.split()[: len(shape)])
        leaf = Leaf(path=f"blocks.{i}", shape=shape, dtype=DTYPES[dtype], axes=axes)
        arrays[leaf.path] = array = random_bits(shape, leaf.dtype, seed=i)
        for box, ranks in parts:
            view = array[slices(box, whole(shape))]
            for rank in ranks:
                held[rank].append(piece_of(leaf, box, view.clone() if rank % 2 else view))
        for rank, targets in enumerate(wants):
            wanted[rank] += [(leaf, box) for box in targets]
    return arrays, held, wanted


def disjoint(ranges: list[tuple[int, int, int]]) -> bool:
    return all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(sorted(ranges)))


@settings(max_examples=40)
@given(case=cases())
def test_any_cut_loads_into_any_boxes_and_moves_every_byte_once(run_ranks, traffic, case):
    """The law of the format. Only here: uneven cuts, replicas, overlapping targets, all at once."""
    arrays, held, wanted = built(case)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "step_00000001"
        traffic.clear()
        outcomes = run_ranks(
            len(held),
            lambda world: save(path, held[world.rank], world=world, block_bytes=BLOCK),
        )
        assert outcomes == [None] * len(held)
        assert disjoint(traffic.written)
        assert sum(stop - start for _, start, stop in traffic.written) == sum(
            array.nbytes for array in arrays.values()
        )
        stored_leaves = read_manifest(path).leaves
        for boxes_of_rank in wanted:
            traffic.clear()
            targets = [piece_of(leaf, box) for leaf, box in boxes_of_rank]
            loaded = load(path, targets, world=World.single(), allow_extra=("*",))
            for piece in loaded.pieces:
                expected = arrays[piece.path][slices(piece.box, whole(piece.shape))]
                assert bits(piece.tensor) == bits(expected), piece.path
            assert disjoint(traffic.read)
            assert loaded.bytes_read == sum(stop - start for _, start, stop in traffic.read)
            # not one block more than those that hold a wanted element
            assert loaded.bytes_read == sum(
                stop - start
                for stored in stored_leaves
                for chunk in stored.chunks
                for start, stop in blocks_of(chunk.nbytes, BLOCK)
                if _holds_wanted(stored.leaf, chunk.box, start, stop, boxes_of_rank)
            )


def _holds_wanted(leaf: Leaf, chunk: Box, start: int, stop: int, wanted) -> bool:
    """Mark the wanted elements in an array and look at the range of the block."""
    mark = torch.zeros(leaf.shape, dtype=torch.bool)
    for other, box in wanted:
        if other.path == leaf.path:
            mark[tuple(slice(*edge) for edge in box)] = True
    size = leaf.dtype.itemsize
    held = mark[tuple(slice(*edge) for edge in chunk)].reshape(-1)
    return bool(held[start // size : stop // size].any())


def test_a_rank_loads_its_stage_and_the_world_knows_the_whole(tmp_path, run_ranks):
    """Only here: no rank of a pipeline wants all leaves, and strictness is about all ranks."""
    first, second = torch.arange(6.0), torch.arange(8.0).reshape(2, 4)
    pieces = [Piece.whole("embed", first, "embed"), Piece.whole("head", second, "vocab embed")]
    save(tmp_path / "c", pieces, world=World.single())

    def stage(world: World):
        mine = pieces[world.rank]
        loaded = load(tmp_path / "c", [piece_of(mine.leaf, mine.box)], world=world)
        return bits(loaded.pieces[0].tensor), loaded.missing, loaded.extra

    assert run_ranks(2, stage) == [(bits(first), (), ()), (bits(second), (), ())]


def test_a_column_cut_and_a_row_cut_of_the_same_array_agree(tmp_path, run_ranks):
    """The everyday change of mesh: saved by rows on 4 ranks, loaded by columns on 2."""
    array = random_bits((24, 10), torch.bfloat16)
    leaf = Piece.whole("w", array, "ffn embed").leaf

    def by_rows(world: World):
        box = ((6 * world.rank, 6 * world.rank + 6), (0, 10))
        piece = piece_of(leaf, box, array[slices(box, whole(leaf.shape))])
        save(tmp_path / "c", [piece], world=world, block_bytes=BLOCK)

    def by_columns(world: World):
        box = ((0, 24), (5 * world.rank, 5 * world.rank + 5))
        (piece,) = load(tmp_path / "c", [piece_of(leaf, box)], world=world).pieces
        return bits(piece.tensor) == bits(array[slices(box, whole(leaf.shape))])

    assert run_ranks(4, by_rows) == [None] * 4
    assert run_ranks(2, by_columns) == [True, True]
    chunks = read_manifest(tmp_path / "c").leaves[0].chunks
    assert [volume(chunk.box) for chunk in chunks] == [60] * 4
