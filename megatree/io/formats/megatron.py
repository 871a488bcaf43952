"""Megatron's legacy `torch` checkpoints: one archive per tensor and pipeline rank."""

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatree.io.checkpoint.box import Box, intersect, slices
from megatree.io.checkpoint.place import Folder
from megatree.io.formats import archive
from megatree.io.formats.arrays import Array
from megatree.io.formats.names import checked_file
from megatree.io.formats.raw import Region, RegionWriter
from megatree.io.formats.shards import cut_dim, merged, rank_box
from megatree.io.formats.tiles import Tiles

TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_([0-9]{2,})(?:_([0-9]{3,}))?", re.ASCII)
_LAYER = re.compile(r"(.*\blayers\.)([0-9]+)(\..*)", re.ASCII)
_FILE = "model_optim_rng.pt"
_SKIPPED = ("_extra_state", "inv_freq")


@dataclass(frozen=True, kw_only=True)
class Legacy:
    """What a legacy checkpoint holds.

    Args:
        reader: the tensors, whole, of global layer numbers.
        args: the arguments of the run.
        version: of the checkpoint.
        iteration: steps made.
        tensor: tensor ranks.
    """

    reader: Tiles
    args: dict[str, Any]
    version: float
    iteration: int
    tensor: int


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
    path: Path, cut: Mapping[str, int], modern: Callable[[str], str], *, tied: str
) -> Legacy:
    """Open a legacy checkpoint: tensor parts put together, layers numbered through the stages.

    Args:
        path: of the checkpoint, or of one iteration.
        cut: end of a (modern) name -> the dim that tensor ranks cut.
        modern: the name that today's Megatron gives a tensor.
        tied: name of the head, which the last stage has a copy of where it is the embedding.

    Raises:
        ValueError: ranks are absent or contradict each other.
    """
    folder = iteration_folder(path)
    ranks: dict[int, dict[int, Path]] = defaultdict(dict)
    for entry in sorted(folder.iterdir()):
        match = _RANK.fullmatch(entry.name)
        if match:
            if entry.is_symlink():
                raise ValueError(f"{entry}: a symbolic link. Copy the folder with 'cp -rL'.")
            ranks[int(match[2] or 0)][int(match[1])] = entry
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
    whole = _whole_ranks(held, len(ranks), tensor, modern, folder)
    if not args.get("untie_embeddings_and_output_weights", False):
        for rank in whole:
            _drop_copy(rank, tied, folder)
    return Legacy(
        reader=merged(whole, cut, str(folder)),
        args=args,
        version=float(first.get("checkpoint_version", 0)),
        iteration=int(first.get("iteration") or 0),
        tensor=tensor,
    )


def _whole_ranks(
    held: Mapping[tuple[int, int], dict[str, Any]],
    stages: int,
    tensor: int,
    modern: Callable[[str], str],
    folder: Path,
) -> list[dict[str, Tensor]]:
    """Return the tensors of each tensor rank, over all stages, layers numbered through."""
    chunks = 1
    while f"model{chunks}" in held[0, 0]:
        chunks += 1
    out: list[dict[str, Tensor]] = []
    for rank in range(tensor):
        tensors: dict[str, Tensor] = {}
        first = 0
        # Interleaved: chunk 0 of all stages comes before chunk 1 of any.
        for chunk in range(chunks):
            for stage in range(stages):
                key = f"model{chunk}" if "model0" in held[0, 0] else "model"
                if not isinstance(held[stage, rank].get(key), dict):
                    raise ValueError(f"{folder}: rank {rank} of stage {stage} lacks {key!r}.")
                flat = {modern(n): t for n, t in _flat(held[stage, rank][key]).items()}
                numbers = {int(m[2]) for name in flat if (m := _LAYER.fullmatch(name))}
                for name, value in flat.items():
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


def _drop_copy(rank: dict[str, Tensor], tied: str, folder: Path) -> None:
    """Take out the last stage's copy of a tied table; it must be one."""
    copy = rank.pop(tied, None)
    table = rank.get("embedding.word_embeddings.weight")
    if copy is not None and (table is None or not bool((copy == table).all())):
        raise ValueError(
            f"{folder}: {tied} is not the embedding, though the arguments tie them. "
            "Set untie_embeddings_and_output_weights in args if the model has two tables."
        )


class LegacyWriter:
    """Writes whole tensors into the archives of all ranks.

    Args:
        folder: empty; gets the tracker and one iteration.
        arrays: whole tensors, of global layer numbers.
        cut: end of a name -> the dim that tensor ranks cut.
        args: arguments of Megatron.
        iteration: steps made.
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
        tensor: int = 1,
        pipeline: int = 1,
        tied: tuple[str, str] | None = None,
    ) -> None:
        self.cut, self.tensor = cut, tensor
        self.targets: dict[str, list[tuple[Box, str]]] = defaultdict(list)
        layers = int(args["num_layers"])
        if layers % pipeline:
            raise ValueError(
                f"--pipeline: {layers} layers do not divide over {pipeline} stages. "
                f"Use a divisor of {layers}."
            )
        regions: dict[str, Region] = {}
        step = folder / f"iter_{iteration:07d}"
        for stage in range(pipeline):
            for rank in range(tensor):
                end = f"_{stage:03d}" if pipeline > 1 else ""
                place = step / f"mp_rank_{rank:02d}{end}"
                place.mkdir(parents=True)
                mine = _local(arrays, stage, pipeline, layers)
                if tied is not None and pipeline > 1 and stage == pipeline - 1:
                    mine[tied[1]] = tied[0]
                model = {}
                for local, name in mine.items():
                    box = rank_box(arrays[name].shape, self._dim(name, arrays), rank, tensor)
                    shape = tuple(b - a for a, b in box)
                    model[local] = Array(shape=shape, dtype=arrays[name].dtype)
                    self.targets[name].append((box, f"{stage}/{rank}/{local}"))
                tree = {
                    "args": Namespace(**args),
                    "checkpoint_version": 3.0,
                    "iteration": iteration,
                    "model": model,
                }
                for path, region in archive.create(place / _FILE, tree).items():
                    regions[f"{stage}/{rank}/{path.partition('/')[2]}"] = region
        self.files = RegionWriter(regions)
        self.tracker = folder, str(iteration)

    def _dim(self, name: str, arrays: Mapping[str, Array]) -> int | None:
        dim = cut_dim(name, self.cut)
        if dim is not None and arrays[name].shape[dim] % self.tensor:
            raise ValueError(
                f"{name}: {arrays[name].shape[dim]} rows do not divide over {self.tensor} tensor "
                "ranks. Use fewer of them."
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


def _local(arrays: Mapping[str, Array], stage: int, pipeline: int, layers: int) -> dict[str, str]:
    """Return the tensors of a stage: name there -> name of the whole model."""
    size, out = layers // pipeline, {}
    for name in arrays:
        match = _LAYER.fullmatch(name)
        if match:
            number = int(match[2]) - stage * size
            if 0 <= number < size:
                out[f"{match[1]}{number}{match[3]}"] = name
        elif (stage == 0) if name.startswith("embedding.") else (stage == pipeline - 1):
            out[name] = name
    return out
