"""Hugging Face folders: config.json, safetensors in shards with an index, tokenizer files."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatree.io.checkpoint import Box
from megatree.io.checkpoint.directory import sync
from megatree.io.formats import safetensors
from megatree.io.formats.arrays import Array
from megatree.io.formats.names import checked_file
from megatree.io.formats.raw import Region, RegionWriter, read_region

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 << 30
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
_MOST_JSON_BYTES = 64 << 20


class HfReader:
    """The tensors of a folder, by their names there.

    Args:
        folder: has model.safetensors, or an index and its shards.

    Raises:
        ValueError: a shard is absent, is not what its header says, or lacks a tensor of the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.regions = _regions(folder)
        self.arrays = {name: region.array for name, region in self.regions.items()}

    def read(self, path: str, box: Box) -> Tensor:
        """Return the elements of a box."""
        return read_region(self.regions[path], box)


def _regions(folder: Path) -> dict[str, Region]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise ValueError(
                f"{folder}: has neither {SINGLE} nor {INDEX}. "
                "Give the folder that save_pretrained wrote, with safetensors."
            )
        return safetensors.read_header(checked_file(folder, SINGLE, place=str(folder)))
    listed = read_json(checked_file(folder, INDEX, place=str(folder))).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(x, str) for x in listed.values()):
        raise ValueError(f"{index}: weight_map is no table of file names. Copy the folder anew.")
    out: dict[str, Region] = {}
    for name in sorted(set(listed.values())):
        regions = safetensors.read_header(checked_file(folder, name, place=str(index)))
        told = {tensor for tensor, file in listed.items() if file == name}
        for tensor in sorted(told ^ regions.keys()):
            where = "the index says, and the shard lacks" if tensor in told else "no index says"
            raise ValueError(f"{folder / name}: {tensor} is what {where}. Copy the folder anew.")
        out |= regions
    return out


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object of a file of reasonable size.

    Raises:
        ValueError: it is none.
    """
    if file.stat().st_size > _MOST_JSON_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, too many for this. Use another.")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON ({error}). Copy it anew.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: no JSON object. Copy it anew.")
    return value


def hf_writer(
    folder: Path,
    arrays: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> RegionWriter:
    """Make the files of a folder, for tensors that are written afterwards.

    Args:
        folder: empty.
        arrays: what it will hold.
        config: its config.json.
        shard_bytes: most bytes of tensors in a file, if they have more than one.
    """
    shards: list[dict[str, Array]] = [{}]
    for name, array in arrays.items():
        held = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and held + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = array
    many = len(shards)
    regions, weight_map = {}, {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if many == 1 else f"model-{number:05d}-of-{many:05d}.safetensors"
        regions |= safetensors.create(folder / name, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    if many > 1:
        total = {"total_size": sum(array.nbytes for array in arrays.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
    write_json(folder / CONFIG, config)
    return RegionWriter(regions)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a new JSON file and wait for the disk."""
    with open(file, "x", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
    sync(file)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files that a folder has; return their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).exists()]
    for name in names:
        shutil.copyfile(checked_file(source, name, place=str(source)), target / name)
        sync(target / name)
    return names
