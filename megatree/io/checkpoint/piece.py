"""Leaves of the global tree, and the boxes of them that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box, extents, spelled, volume, whole
from megatree.io.checkpoint.dtypes import DTYPES, dtype_name


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One global array as declared: logical sizes (no padding), whatever the mesh.

    Args:
        path: where it is in the tree, "." between the steps: "blocks.wq".
        shape: elements per dim.
        dtype: one of `dtypes.DTYPES`.
        axes: the logical axis of each dim, in order: "layers vocab embed"; "" for a scalar.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: str

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("Leaf: the path is empty. Name the leaf, for example 'blocks.wq'.")
        if dtype_name(self.dtype) not in DTYPES:
            raise ValueError(
                f"{self.path}: a checkpoint cannot hold {self.dtype}. "
                f"Convert the leaf to one of {', '.join(DTYPES)}."
            )
        if any(size < 0 for size in self.shape):
            raise ValueError(f"{self.path}: shape {self.shape} has a negative size. Correct it.")
        if len(self.axes.split()) != len(self.shape):
            raise ValueError(
                f"{self.path}: axes '{self.axes}' name {len(self.axes.split())} dims, the shape "
                f"{self.shape} has {len(self.shape)}. Give one axis name for each dim."
            )

    def __str__(self) -> str:
        return f"{self.path} {dtype_name(self.dtype)} {self.shape} '{self.axes}'"

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.box_nbytes(whole(self.shape))

    def box_nbytes(self, box: Box) -> int:
        """Return the bytes of a part of it."""
        return volume(box) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A box of a leaf on this rank: what `save` writes, and what `load` fills.

    Args:
        path, shape, dtype, axes: of the global array, see `Leaf`.
        box: the part held here, (start, stop) per dim in global coordinates; it may be empty.
        data: the elements of the box, on any device and with any strides. None (for `load` only):
            memory on the CPU is made for it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: str
    box: Box
    data: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        leaf = self.leaf
        if len(self.box) != len(leaf.shape) or any(
            not 0 <= start <= stop <= size
            for (start, stop), size in zip(self.box, leaf.shape, strict=True)
        ):
            raise ValueError(
                f"{self.path}: box {spelled(self.box)} is not inside the shape {self.shape}. "
                "Give 0 <= start <= stop <= size for each dim."
            )
        if self.data is not None:
            self._check_data(self.data)

    def _check_data(self, data: Tensor) -> None:
        if tuple(data.shape) != extents(self.box) or data.dtype != self.dtype:
            raise ValueError(
                f"{self.path}: the data is {dtype_name(data.dtype)} {tuple(data.shape)}, the box "
                f"{spelled(self.box)} needs {dtype_name(self.dtype)} {extents(self.box)}. "
                "Pass this rank's part of the unpadded array."
            )
        if data.layout != torch.strided or data.device.type == "meta":
            raise ValueError(
                f"{self.path}: the data has no bytes to read or write (layout {data.layout}, "
                f"device {data.device}). Pass a dense tensor on a real device."
            )

    @staticmethod
    def whole(path: str, data: Tensor, axes: str) -> Piece:
        """Return the piece that is all of its array, as on one device."""
        shape = tuple(data.shape)
        return Piece(
            path=path, shape=shape, dtype=data.dtype, axes=axes, box=whole(shape), data=data
        )

    @property
    def tensor(self) -> Tensor:
        """The data, of a piece that has some."""
        if self.data is None:
            raise ValueError(f"{self.path}: the piece has no data. Pass it with data=.")
        return self.data

    @property
    def leaf(self) -> Leaf:
        """The global array it belongs to."""
        return Leaf(path=self.path, shape=self.shape, dtype=self.dtype, axes=self.axes)
