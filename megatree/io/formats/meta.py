"""Meta's Llama: consolidated.*.pth of model parallel ranks, and params.json; read only."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatree.io.formats import archive
from megatree.io.formats.hf import read_json
from megatree.io.formats.names import checked_file
from megatree.io.formats.shards import merged, part_of
from megatree.io.formats.tiles import Tiles

_FILE = re.compile(r"consolidated\.([0-9]{2,})\.pth", re.ASCII)


def read_params(folder: Path) -> dict[str, Any]:
    """Return params.json."""
    return read_json(checked_file(folder, "params.json", place=str(folder)))


def meta_reader(folder: Path, cut: Mapping[str, int], ignored: tuple[str, ...] = ()) -> Tiles:
    """Return the tensors of a folder, those that ranks have parts of whole.

    Args:
        folder: has consolidated.00.pth and so on.
        cut: end of a name -> the dim that ranks cut.
        ignored: names to leave out.

    Raises:
        ValueError: a rank's file is absent, or has other tensors than the first, or a copy differs.
    """
    names = sorted(entry.name for entry in folder.iterdir() if _FILE.fullmatch(entry.name))
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(max(1, len(names)))]
    if names != expected:
        raise ValueError(
            f"{folder}: has {', '.join(names) or 'no file'}, not {', '.join(expected)}. "
            "Copy the files of all ranks."
        )
    ranks = []
    for name in names:
        file = checked_file(folder, name, place=str(folder))
        held = archive.load(file, str(file))
        if not isinstance(held, dict) or not all(isinstance(x, Tensor) for x in held.values()):
            raise ValueError(f"{file}: holds more than tensors. Take another copy.")
        ranks.append({key: part_of(x) for key, x in held.items() if key not in ignored})
    return merged(ranks, cut, str(folder))
