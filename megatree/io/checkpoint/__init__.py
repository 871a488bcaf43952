"""The native checkpoint: a tree of global arrays in a directory, whatever the mesh."""

from megatree.io.checkpoint.box import Box
from megatree.io.checkpoint.directory import latest, step_name, steps_in
from megatree.io.checkpoint.load import Loaded, load, load_extra
from megatree.io.checkpoint.manifest import Chunk, Manifest, StoredLeaf
from megatree.io.checkpoint.parse import read_manifest
from megatree.io.checkpoint.piece import Leaf, Piece
from megatree.io.checkpoint.retention import Retention
from megatree.io.checkpoint.save import save
from megatree.io.checkpoint.saver import Saved, Saver

__all__ = [
    "Box",
    "Chunk",
    "Leaf",
    "Loaded",
    "Manifest",
    "Piece",
    "Retention",
    "Saved",
    "Saver",
    "StoredLeaf",
    "latest",
    "load",
    "load_extra",
    "read_manifest",
    "save",
    "step_name",
    "steps_in",
]
