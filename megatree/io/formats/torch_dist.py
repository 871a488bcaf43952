"""Megatron's `torch_dist`: torch DCP with names of its own and a common state beside."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box, extents, whole
from megatree.io.checkpoint.directory import sync
from megatree.io.checkpoint.place import Folder
from megatree.io.formats import archive
from megatree.io.formats.arrays import Array
from megatree.io.formats.dcp import DcpReader, DcpWriter
from megatree.io.formats.hf import read_json, write_json
from megatree.io.formats.megatron import (
    TABLE,
    TRACKER,
    drop_copy,
    iteration_folder,
    whole_ranks,
)
from megatree.io.formats.megatron_state import (
    BUCKET,
    KEYS,
    MASTER,
    Parts,
    from_buckets,
)
from megatree.io.formats.megatron_state import MOMENTS as STATES
from megatree.io.formats.names import checked_file
from megatree.io.formats.shards import Part, cut_dim, merged, rank_box
from megatree.io.formats.tiles import Tile, Tiles

_COMMON_KEY = "common_state/shard_0_1"
_LAYERS, _STACK = "decoder.layers", "decoder.layers."
_ONLY = "Convert with --weights-only."
Bucket: TypeAlias = tuple[int, torch.dtype, Callable[[int, int], Tensor]]
_LINEAR = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
MOMENTS: Mapping[str, str] = {
    "optimizer.state.exp_avg.": "m",
    "optimizer.state.exp_avg_sq.": "v",
    "optimizer.state.param.": "master",
    "optimizer.state.fp32_param.": "master",
}
"""Start of a name -> entry of our optimizer's state."""
RESHARDABLE = "fully_reshardable"
CONTENT: Mapping[str, Any] = {
    "distrib_optim_sharding_type": RESHARDABLE,
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}
"""What says how the optimizer is laid out; without it, Megatron assumes an older layout."""
_DISTRIBUTED = "optimizer.distributed."


def read_torch_dist(path: Path, *, optimizer: bool = True) -> tuple[DcpReader, dict[str, Any]]:
    """Open a checkpoint; return its tensors and the common state (args, iteration, ...).

    Args:
        path: of the checkpoint, or of one iteration.
        optimizer: whether its state will be read.

    Raises:
        ValueError: it is none, or its optimizer is in a layout that is not read.
    """
    folder = iteration_folder(path)
    told = read_json(checked_file(folder, "metadata.json", place=str(folder)))
    if told.get("sharded_backend") != "torch_dist":
        raise ValueError(
            f"{folder}: its sharded_backend is {told.get('sharded_backend')!r}. "
            "Convert it with Megatron's --ckpt-convert-format torch_dist."
        )
    reader = DcpReader(folder)
    if optimizer:
        _refuse_unread(reader, folder)
    if _COMMON_KEY in reader.blobs:
        held = reader.blob(_COMMON_KEY)
        common = held[0] if isinstance(held, list) and held else held
    elif (folder / "common.pt").exists():
        file = checked_file(folder, "common.pt", place=str(folder))
        common = archive.plain(archive.load(file, str(file)))
    else:
        raise ValueError(f"{folder}: has neither common.pt nor {_COMMON_KEY}. Copy it anew.")
    if not isinstance(common, dict):
        raise ValueError(f"{folder}: its common state is no dict. Take another copy.")
    return reader, common


def _refuse_unread(reader: DcpReader, folder: Path) -> None:
    whole = [key for key in reader.blobs if key.endswith(".param_state/shard_0_1")]
    odd = [x for x in reader.arrays if x.startswith(_DISTRIBUTED) and not BUCKET.fullmatch(x)]
    chained = [key for key in (*reader.arrays, *reader.blobs) if key.startswith("chained_")]
    for names in (whole, odd, chained):
        if names:
            raise ValueError(
                f"{folder}: its optimizer is in a layout that is not read ({names[0]}). Save it "
                "with --dist-ckpt-optim-fully-reshardable, or convert with --weights-only."
            )


def in_buckets(reader: DcpReader) -> bool:
    """Return whether a checkpoint has an optimizer in buckets, as `dp_reshardable` keeps it."""
    return any(BUCKET.fullmatch(name) for name in reader.arrays)


def groups_in(reader: DcpReader, common: Mapping[str, Any]) -> Any:
    """Return what the optimizer keeps beside its tensors: groups, steps made."""
    key = f"{_DISTRIBUTED}dp_group_idx_0.optimizer/shard_0_1"
    if key not in reader.blobs:
        return common.get("optimizer")
    held = reader.blob(key)
    return {"optimizer": held[0]} if isinstance(held, list) and held else None


def bucket_state(
    reader: DcpReader,
    args: Mapping[str, Any],
    *,
    cut: Mapping[str, int],
    modern: Callable[[str], str],
    orders: Sequence[Callable[[Iterable[str]], list[str]]],
    tied: str,
) -> Tiles:
    """Return the state in buckets as whole tensors, named as in a legacy checkpoint.

    Args:
        reader: of the checkpoint.
        args: arguments of the run: how many ranks.
        cut: end of a (modern) name -> the dim that tensor ranks cut.
        modern: the name of a tensor without Transformer Engine.
        orders: ways in which the model may have its parameters, likeliest first.
        tied: name of the head, which the last stage has a copy of where it is the embedding.

    Raises:
        ValueError: the buckets are not those of the model.
    """
    place = reader.folder
    buckets = _buckets(reader)
    tensor = int(args.get("tensor_model_parallel_size") or 1)
    stages = int(args.get("pipeline_model_parallel_size") or 1)
    groups = {group for group, _ in buckets}
    if groups != set(range(tensor * stages)):
        raise ValueError(
            f"{place}: has buckets of {len(groups)} ranks of the model, and its arguments say "
            f"{tensor} tensor times {stages} pipeline ranks. {_ONLY}"
        )
    chunks = 1 + max(chunk for _, chunk in buckets)
    layers = next((x.shape[0] for name, x in reader.arrays.items() if name.startswith(_STACK)), 0)
    size, left = divmod(layers, stages * chunks)
    if left or not layers:
        raise ValueError(
            f"{place}: its {layers} stacked layers do not divide over {stages} stages of {chunks} "
            f"chunks. {_ONLY}"
        )
    shares = not args.get("untie_embeddings_and_output_weights", False)
    apart = (TABLE, tied) if shares and stages > 1 else ()
    held: dict[tuple[int, int], list[Parts]] = {}
    for stage in range(stages):
        for rank in range(tensor):
            found = []
            for chunk in range(chunks):
                number = chunk * stages + stage
                ends = number == 0, number == stages * chunks - 1
                mine = _rank_parts(
                    reader, cut, modern, rank, tensor, (number * size, size), ends,
                    tied if apart else "", bool(args.get("swiglu")),
                )  # fmt: skip
                found.append(
                    from_buckets(
                        mine,
                        buckets[stage * tensor + rank, chunk],
                        apart,
                        [order(mine) for order in orders],
                        f"{place}: dp_group_idx_{stage * tensor + rank}",
                    )
                )
            held[stage, rank] = found
    whole = whole_ranks(held, stages, tensor, place)
    if apart:
        for rank, tensors in enumerate(whole):
            for start in (MASTER, *STATES):
                drop_copy(tensors, f"{start}{tied}", f"{start}{TABLE}", rank, place)
    return merged(whole, cut, str(place))


def _buckets(reader: DcpReader) -> dict[tuple[int, int], dict[str, list[Bucket]]]:
    """Return (rank of the model, chunk) -> key -> its buckets in their order."""
    found: dict[tuple[int, int], dict[str, dict[int, str]]] = {}
    for name in reader.arrays:
        match = BUCKET.fullmatch(name)
        if match:
            place = found.setdefault((int(match[1]), int(match[2])), {})
            place.setdefault(match[4], {})[int(match[3])] = name
    out: dict[tuple[int, int], dict[str, list[Bucket]]] = {}
    for at, kinds in found.items():
        for key, names in kinds.items():
            if sorted(names) != list(range(len(names))) or sorted(kinds) != sorted(KEYS):
                raise ValueError(
                    f"{reader.folder}: dp_group_idx_{at[0]} lacks buckets of {key}. Copy it anew."
                )
            out.setdefault(at, {})[key] = [_bucket(reader, names[i]) for i in range(len(names))]
    return out


def _bucket(reader: DcpReader, name: str) -> Bucket:
    array = reader.arrays[name]
    return array.shape[0], array.dtype, partial(_read_range, reader, name)


def _read_range(reader: DcpReader, name: str, start: int, stop: int) -> Tensor:
    return reader.read(name, ((start, stop),))


def _rank_parts(
    reader: DcpReader,
    cut: Mapping[str, int],
    modern: Callable[[str], str],
    rank: int,
    tensor: int,
    layers: tuple[int, int],
    ends: tuple[bool, bool],
    tied: str,
    gated: bool,
) -> Parts:
    """Return what a rank's model has of the tensors, by today's names and local layer numbers."""
    out: Parts = {}
    for name, array in reader.arrays.items():
        if name.startswith("optimizer."):
            continue
        stacked = name.startswith(_STACK)
        first = name.startswith("embedding.")
        copied = name == TABLE and bool(tied) and ends[1]
        if not (stacked or copied or ends[0 if first else 1]):
            continue
        bare = modern(name.replace(_STACK, f"{_STACK}0.", 1) if stacked else name)
        shape = array.shape[1:] if stacked else array.shape
        dim = cut_dim(bare, cut)
        twice = gated and bare.rpartition(".")[0].endswith("mlp.linear_fc1")
        box = rank_box(shape, dim, rank, tensor)
        for local in range(layers[1]) if stacked else (0,):
            layer = (layers[0] + local,) if stacked else ()
            part = _slice_part(reader, name, layer, box)
            if twice:
                part = _gated_part(reader, name, layer, shape, rank, tensor)
            if stacked:
                out[bare.replace(f"{_STACK}0.", f"{_STACK}{local}.", 1)] = part
                continue
            if ends[0 if first else 1]:
                out[bare] = part
            if copied:
                out[tied] = part
    return out


def _slice_part(reader: DcpReader, name: str, layer: tuple[int, ...], box: Box) -> Part:
    array = Array(shape=extents(box), dtype=reader.arrays[name].dtype)
    return Part(array=array, read=partial(_read_slice, reader, name, layer, box))


def _read_slice(
    reader: DcpReader, name: str, layer: tuple[int, ...], held: Box, local: Box
) -> Tensor:
    inner = tuple((a + o, b + o) for (a, b), (o, _) in zip(local, held, strict=True))
    return reader.read(name, (*((n, n + 1) for n in layer), *inner)).view(extents(local))


def _gated_part(
    reader: DcpReader, name: str, layer: tuple[int, ...], shape: tuple[int, ...], rank: int,
    tensor: int,
) -> Part:  # fmt: skip
    """Return the rows of the gate that a rank has, and below them those of what is gated."""
    half, rows = shape[0] // 2, shape[0] // 2 // tensor
    inner = whole(shape)[1:]
    parts = [
        _slice_part(reader, name, layer, ((at + rank * rows, at + (rank + 1) * rows), *inner))
        for at in (0, half)
    ]
    array = Array(shape=(2 * rows, *shape[1:]), dtype=reader.arrays[name].dtype)
    tiles = [
        Tile(box=((at, at + rows), *inner), read=part.read)
        for at, part in zip((0, rows), parts, strict=True)
    ]
    return Part(array=array, read=partial(Tiles({name: array}, {name: tiles}, name).read, name))


class TorchDistWriter(DcpWriter):
    """Writes a checkpoint that Megatron's --ckpt-format torch_dist loads.

    Args:
        folder: empty; gets the tracker and one iteration.
        arrays: tensors by Megatron's names.
        args: arguments of Megatron.
        iteration: steps made.
        more: what else the common state holds.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, Array],
        *,
        args: Mapping[str, Any],
        iteration: int,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        self.root, self.iteration = folder, iteration
        step = folder / f"iter_{iteration:07d}"
        step.mkdir()
        # Megatron expects what fp8 would keep of every linear layer, and without fp8 it is nothing.
        layers = int(args["num_layers"])
        blobs = {
            f"{_LAYERS}.{name}._extra_state/shard_{layer}_{layers}": [None]
            for name in _LINEAR
            for layer in range(layers)
        }
        super().__init__(step, arrays, blobs)
        # The layout of 0.16, which later versions read too; the other way they fail.
        common = {"args": Namespace(**args), "iteration": iteration, "checkpoint_version": 3.0}
        common |= more or {}
        torch.save(common, step / "common.pt")
        sync(step / "common.pt")

    def finish(self) -> None:
        """Write metadata and tracker, and wait for the disk."""
        super().finish()
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        common = {"common_backend": "torch", "common_backend_version": 1}
        write_json(self.folder / "metadata.json", backend | common)
        Folder(self.root).put(TRACKER, str(self.iteration).encode())
