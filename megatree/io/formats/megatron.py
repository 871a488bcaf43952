"""Megatron's legacy `torch` checkpoints: archives per tensor and pipeline rank."""

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box, intersect, slices
from megatree.io.checkpoint.place import Folder
from megatree.io.formats import archive
from megatree.io.formats.arrays import Array
from megatree.io.formats.flat import lay_out
from megatree.io.formats.megatron_state import (
    KEYS,
    MASTER,
    MOMENTS,
    STATE,
    Parts,
    from_buffers,
    from_numbers,
    groups_of,
    steps_of,
)
from megatree.io.formats.names import checked_file
from megatree.io.formats.raw import Region, RegionWriter
from megatree.io.formats.shards import cut_dim, merged, part_of, rank_box, require_copy
from megatree.io.formats.tiles import Tiles

TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_([0-9]{2,})(?:_([0-9]{3,}))?", re.ASCII)
_LAYER = re.compile(r"(.*\blayers\.)([0-9]+)(\..*)", re.ASCII)
_FILE, _STATE_FILE = "model_optim_rng.pt", "distrib_optim.pt"
TABLE = "embedding.word_embeddings.weight"
# Where a run says nothing else, gradients are reduced in buckets of this many, or more with dp.
_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000
_SKIPPED = ("_extra_state", "inv_freq")


@dataclass(frozen=True, kw_only=True)
class Legacy:
    """What a legacy checkpoint holds.

    Args:
        reader: the tensors, whole, of global layer numbers; the optimizer's are
            "optimizer.state.exp_avg.NAME" and so on.
        args: the arguments of the run.
        version: of the checkpoint.
        iteration: steps made.
        tensor: tensor ranks.
        updates: steps that the optimizer made, if it says so.
        groups: the optimizer's groups, without their parameters.
        scheduler: state of the learning rate's schedule.
    """

    reader: Tiles
    args: dict[str, Any]
    version: float
    iteration: int
    tensor: int
    updates: int | None
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any]


def iteration_folder(path: Path) -> Path:
    """Return the folder of the iteration that the tracker names, or the folder itself.

    Raises:
        ValueError: the tracker names none.
    """
    tracker = path / TRACKER
    if not tracker.exists():
        return path
    text = checked_file(path, TRACKER, place=str(path)).read_text("ascii", "replace")[:64].strip()
    if text != "release" and not text.isdigit():
        raise ValueError(f"{tracker}: says {text!r}, no iteration. Give the folder of one.")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir() or folder.is_symlink():
        raise ValueError(f"{tracker}: {folder.name} is not there. Give the folder of an iteration.")
    return folder


def read_legacy(
    path: Path,
    cut: Mapping[str, int],
    modern: Callable[[str], str],
    *,
    tied: str,
    optimizer: bool = True,
) -> Legacy:
    """Open a legacy checkpoint: tensor parts put together, layers numbered through the stages.

    Args:
        path: of the checkpoint, or of one iteration.
        cut: end of a (modern) name -> the dim that tensor ranks cut.
        modern: the name that today's Megatron gives a tensor.
        tied: name of the head, which the last stage has a copy of where it is the embedding.
        optimizer: whether its state is read too.

    Raises:
        ValueError: ranks are absent or contradict each other.
    """
    folder = iteration_folder(path)
    ranks = _rank_folders(folder)
    tensor = max((len(stage) for stage in ranks.values()), default=0)
    wanted = {(p, t) for p in range(len(ranks)) for t in range(tensor)}
    there = {(p, t) for p, stage in ranks.items() for t in stage}
    if not there or there != wanted:
        shown = ", ".join(f"mp_rank_{t:02d}_{p:03d}" for p, t in sorted(wanted - there)[:8])
        raise ValueError(f"{folder}: lacks {shown or 'all mp_rank folders'}. Copy all ranks.")
    held = {}
    for stage, rank in sorted(there):
        file = checked_file(ranks[stage][rank], _FILE, place=str(ranks[stage][rank]))
        held[stage, rank] = archive.load(file, str(file))
        if not isinstance(held[stage, rank], dict):
            raise ValueError(f"{file}: holds no dict. Take another copy.")
    first = held[0, 0]
    args = archive.plain(first.get("args") or {})
    shares = not args.get("untie_embeddings_and_output_weights", False)
    chunks = {
        (stage, rank): _chunks_of(held[stage, rank], modern, ranks[stage][rank])
        for stage, rank in sorted(there)
    }
    if optimizer:
        apart = (TABLE, tied) if shares and len(ranks) > 1 else ()
        for (stage, rank), parts in chunks.items():
            state = _state_of(held[stage, rank], parts, apart, args, ranks[stage][rank])
            for chunk, more in zip(parts, state, strict=True):
                chunk |= more
    whole = whole_ranks(chunks, len(ranks), tensor, folder)
    if shares:
        for rank, tensors in enumerate(whole):
            for start in ("", MASTER, *MOMENTS):
                drop_copy(tensors, f"{start}{tied}", f"{start}{TABLE}", rank, folder)
    return Legacy(
        reader=merged(whole, cut, str(folder)),
        args=args,
        version=float(first.get("checkpoint_version", 0)),
        iteration=int(first.get("iteration") or 0),
        tensor=tensor,
        updates=steps_of(first.get("optimizer")),
        groups=archive.plain(groups_of(first.get("optimizer"))),
        scheduler=archive.plain(first.get("opt_param_scheduler") or {}),
    )


def _rank_folders(folder: Path) -> dict[int, dict[int, Path]]:
    """Return stage -> tensor rank -> folder."""
    ranks: dict[int, dict[int, Path]] = defaultdict(dict)
    for entry in sorted(folder.iterdir()):
        match = _RANK.fullmatch(entry.name)
        if match:
            if entry.is_symlink():
                raise ValueError(f"{entry}: a symbolic link. Copy the folder with 'cp -rL'.")
            ranks[int(match[2] or 0)][int(match[1])] = entry
    return ranks


def _chunks_of(held: Mapping[str, Any], modern: Callable[[str], str], place: Path) -> list[Parts]:
    """Return the parameters of each chunk of a rank's model, in their order."""
    keys = ["model"]
    if "model0" in held:
        keys = [f"model{number}" for number in range(len(held)) if f"model{number}" in held]
    out = []
    for key in keys:
        if not isinstance(held.get(key), dict):
            raise ValueError(f"{place / _FILE}: lacks {key!r}. Copy the files of all ranks anew.")
        flat = _flat(held[key])
        out.append({modern(name): part_of(x) for name, x in flat.items()})
    return out


def _state_of(
    held: Mapping[str, Any],
    chunks: list[Parts],
    apart: tuple[str, ...],
    args: Mapping[str, Any],
    place: Path,
) -> list[Parts]:
    """Return the optimizer's state of a rank; nothing if there is none."""
    told = held.get("optimizer")
    if isinstance(told, (list, tuple)):
        raise ValueError(
            f"{place / _FILE}: has {len(told)} optimizers, one beside the other, and they are read "
            "one at a time. Convert with --weights-only."
        )
    if not isinstance(told, Mapping):
        return [{} for _ in chunks]
    inner = told.get("optimizer", told)
    if isinstance(inner, Mapping) and inner.get("state"):
        return from_numbers(chunks, told, str(place / _FILE))
    if not (place / _STATE_FILE).exists():
        raise ValueError(
            f"{place}: its optimizer is in {_STATE_FILE}, which is absent. Copy it beside, or "
            "convert with --weights-only."
        )
    file = checked_file(place, _STATE_FILE, place=str(place))
    buffers = archive.load(file, str(file))
    if not isinstance(buffers, Mapping):
        raise ValueError(f"{file}: holds no dict. Take another copy.")
    dp = args.get("data_parallel_size") or 1
    usual = args.get("ddp_bucket_size") or max(_BUCKET, _BUCKET_PER_RANK * dp)
    sizes = (usual, None) if args.get("overlap_grad_reduce") else (None, usual)
    return from_buffers(chunks, buffers, apart, sizes, str(file))


def whole_ranks(
    held: Mapping[tuple[int, int], list[Parts]], stages: int, tensor: int, folder: Path
) -> list[Parts]:
    """Return the tensors of each tensor rank, over all stages, layers numbered through.

    Args:
        held: (stage, tensor rank) -> per chunk of its model, the tensors.
        stages, tensor: ranks.
        folder: for errors.
    """
    counts = {len(chunks) for chunks in held.values()}
    if len(counts) > 1:
        raise ValueError(f"{folder}: ranks have {sorted(counts)} chunks. Copy all ranks anew.")
    out: list[Parts] = []
    for rank in range(tensor):
        tensors: Parts = {}
        first = 0
        # Interleaved: chunk 0 of all stages comes before chunk 1 of any.
        for chunk in range(counts.copy().pop()):
            for stage in range(stages):
                mine = held[stage, rank][chunk]
                numbers = {int(m[2]) for name in mine if (m := _LAYER.fullmatch(name))}
                for name, value in mine.items():
                    match = _LAYER.fullmatch(name)
                    path = f"{match[1]}{int(match[2]) + first}{match[3]}" if match else name
                    if path in tensors:
                        raise ValueError(f"{folder}: {path} is in two stages. Take another copy.")
                    tensors[path] = value
                first += len(numbers)
        out.append(tensors)
    return out


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            out |= _flat(value, f"{path}.")
        elif isinstance(value, Tensor) and not path.endswith(_SKIPPED):
            out[path] = value
    return out


def drop_copy(tensors: Parts, tied: str, table: str, rank: int, folder: Path) -> None:
    """Take out the last stage's copy of a tied table; it must be one."""
    copy = tensors.pop(tied, None)
    if copy is None:
        return
    fix = "Set untie_embeddings_and_output_weights in args if the model has two tables."
    if table not in tensors:
        raise ValueError(f"{folder}: has {tied} of tensor rank {rank}, and no {table}. {fix}")
    which = f"{folder}: {tied} of tensor rank {rank}, tied by the arguments"
    require_copy(tensors[table], copy, which, table, fix)


class LegacyWriter:
    """Writes whole tensors into the archives of all ranks.

    Args:
        folder: empty; gets the tracker and one iteration.
        arrays: whole tensors, of global layer numbers, in the order in which the model has them;
            the optimizer's, if any, go into the distributed optimizer's file.
        cut: end of a name -> the dim that tensor ranks cut.
        args: arguments of Megatron.
        iteration: steps made.
        more: what else the archives hold.
        tensor, pipeline: ranks.
        tied: (embedding, head) if the last of several stages keeps a copy of the table.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, Array],
        *,
        cut: Mapping[str, int],
        args: Mapping[str, Any],
        iteration: int,
        more: Mapping[str, Any] | None = None,
        tensor: int = 1,
        pipeline: int = 1,
        tied: tuple[str, str] | None = None,
    ) -> None:
        self.cut, self.tensor, self.arrays = cut, tensor, arrays
        self.targets: dict[str, list[tuple[Box, str]]] = defaultdict(list)
        self.tied = tied if pipeline > 1 else None
        layers = int(args["num_layers"])
        if layers % pipeline:
            raise ValueError(
                f"--pipeline: {layers} layers do not divide over {pipeline} stages. "
                f"Use a divisor of {layers}."
            )
        weights = [name for name in arrays if not name.startswith(STATE)]
        regions: dict[str, Region] = {}
        step = folder / f"iter_{iteration:07d}"
        for stage in range(pipeline):
            mine = _local(weights, stage, pipeline, layers)
            if self.tied is not None and stage == pipeline - 1:
                mine[self.tied[1]] = self.tied[0]
            for rank in range(tensor):
                end = f"_{stage:03d}" if pipeline > 1 else ""
                place = step / f"mp_rank_{rank:02d}{end}"
                place.mkdir(parents=True)
                start = f"{stage}/{rank}"
                model = {
                    local: self._place(name, rank, f"{start}/{local}")
                    for local, name in mine.items()
                }
                tree = {
                    "args": Namespace(**args),
                    "checkpoint_version": 3.0,
                    "iteration": iteration,
                    "model": model,
                    **(more or {}),
                }
                for path, region in archive.create(place / _FILE, tree).items():
                    regions[f"{start}/{path.partition('/')[2]}"] = region
                if len(weights) < len(arrays):
                    regions |= self._state(place / _STATE_FILE, mine, model, rank, start)
        self.files = RegionWriter(regions)
        self.tracker = folder, str(iteration)

    def _place(self, name: str, rank: int, target: str) -> Array:
        """Note where the part of a tensor goes that a rank has; return its declaration."""
        array = self.arrays[name]
        box = rank_box(array.shape, self._dim(name), rank, self.tensor)
        self.targets[name].append((box, target))
        return Array(shape=tuple(b - a for a, b in box), dtype=array.dtype)

    def _state(
        self,
        file: Path,
        mine: Mapping[str, str],
        model: Mapping[str, Array],
        rank: int,
        start: str,
    ) -> dict[str, Region]:
        """Make the distributed optimizer's file of a rank; return where its tensors go."""
        shapes = {local: array.shape for local, array in model.items()}
        buffer = lay_out(shapes, self.tied or ())
        total = sum(buffer.sizes)
        kinds = next(iter(model.values())).dtype, torch.float32
        tensors = {key: Array(shape=(total,), dtype=torch.float32) for key in KEYS}
        tree = {"buckets_coalesced": True, 0: {kinds: {**tensors, "numel_unpadded": total}}}
        flat = {path.rpartition("/")[2]: x for path, x in archive.create(file, tree).items()}
        regions = {}
        for key in KEYS:
            for slot in buffer.slots:
                target = f"{start}/{STATE}{key}.{slot.name}"
                array = self._place(f"{STATE}{key}.{mine[slot.name]}", rank, target)
                offset = flat[key].offset + buffer.at(slot) * array.dtype.itemsize
                regions[target] = Region(file=file, offset=offset, array=array)
        return regions

    def _dim(self, name: str) -> int | None:
        dim = cut_dim(name, self.cut)
        if dim is not None and self.arrays[name].shape[dim] % self.tensor:
            raise ValueError(
                f"{name}: {self.arrays[name].shape[dim]} rows do not divide over {self.tensor} "
                "tensor ranks. Use fewer of them."
            )
        return dim

    def write(self, path: str, box: Box, data: Tensor) -> None:
        """Write the elements of a box, to every rank that holds some of them."""
        for held, target in self.targets[path]:
            common = intersect(held, box)
            if common is not None:
                local = tuple(
                    (a - origin, b - origin)
                    for (a, b), (origin, _) in zip(common, held, strict=True)
                )
                self.files.write(target, local, data[slices(common, box)])

    def finish(self) -> None:
        """Wait for the disk, then name the iteration."""
        self.files.finish()
        Folder(self.tracker[0]).put(TRACKER, self.tracker[1].encode())


def _local(names: Sequence[str], stage: int, pipeline: int, layers: int) -> dict[str, str]:
    """Return the tensors of a stage: name there -> name of the whole model."""
    size, out = layers // pipeline, {}
    for name in names:
        match = _LAYER.fullmatch(name)
        if match:
            number = int(match[2]) - stage * size
            if 0 <= number < size:
                out[f"{match[1]}{number}{match[3]}"] = name
        elif (stage == 0) if name.startswith("embedding.") else (stage == pipeline - 1):
            out[name] = name
    return out
