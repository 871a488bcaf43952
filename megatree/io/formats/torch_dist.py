"""Megatron's `torch_dist`: torch DCP with names of its own and a common state beside."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatree.io.checkpoint.directory import sync
from megatree.io.checkpoint.place import Folder
from megatree.io.formats import archive
from megatree.io.formats.arrays import Array
from megatree.io.formats.dcp import DcpReader, DcpWriter
from megatree.io.formats.hf import read_json, write_json
from megatree.io.formats.megatron import TRACKER, iteration_folder
from megatree.io.formats.names import checked_file

_COMMON_KEY = "common_state/shard_0_1"
_LAYERS = "decoder.layers"
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
}
"""Start of a name -> entry of our optimizer's state."""


def read_torch_dist(path: Path, *, optimizer: bool = True) -> tuple[DcpReader, dict[str, Any]]:
    """Open a checkpoint; return its tensors and the common state (args, iteration, ...).

    Args:
        path: of the checkpoint, or of one iteration.
        optimizer: whether its state will be read.

    Raises:
        ValueError: it is none, or its optimizer is in a layout that only its own mesh can load.
    """
    folder = iteration_folder(path)
    told = read_json(checked_file(folder, "metadata.json", place=str(folder)))
    if told.get("sharded_backend") != "torch_dist":
        raise ValueError(
            f"{folder}: its sharded_backend is {told.get('sharded_backend')!r}. "
            "Convert it with Megatron's --ckpt-convert-format torch_dist."
        )
    reader = DcpReader(folder)
    flat = next((key for key in reader.arrays if key.startswith("optimizer.distributed.")), None)
    if optimizer and flat is not None:
        raise ValueError(
            f"{folder}: its optimizer is in flat buffers of the mesh that wrote it ({flat}). "
            "Save it with --dist-ckpt-optim-fully-reshardable, or convert with --weights-only."
        )
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


class TorchDistWriter(DcpWriter):
    """Writes a checkpoint that Megatron's --ckpt-format torch_dist loads.

    Args:
        folder: empty; gets the tracker and one iteration.
        arrays: tensors by Megatron's names.
        args: arguments of Megatron.
        iteration: steps made.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, Array],
        *,
        args: Mapping[str, Any],
        iteration: int,
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
        torch.save(common, step / "common.pt")
        sync(step / "common.pt")

    def finish(self) -> None:
        """Write metadata and tracker, and wait for the disk."""
        super().finish()
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        common = {"common_backend": "torch", "common_backend_version": 1}
        write_json(self.folder / "metadata.json", backend | common)
        Folder(self.root).put(TRACKER, str(self.iteration).encode())
