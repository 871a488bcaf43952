"""Arrays in another dtype, converted as they are read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from megatree.io.checkpoint import Box
from megatree.io.formats.arrays import Array, Reader


@dataclass(frozen=True, kw_only=True)
class Cast:
    """A reader some of whose floating-point arrays have another dtype.

    Args:
        source: what is read.
        dtype: of what comes out.
        only: paths that are converted; the others stay as they are.
    """

    source: Reader
    dtype: torch.dtype
    only: frozenset[str]

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        """What there is."""
        return {
            path: replace(array, dtype=self.dtype)
            if path in self.only and array.dtype.is_floating_point
            else array
            for path, array in self.source.arrays.items()
        }

    def read(self, path: str, box: Box) -> Tensor:
        """Return the elements of a box."""
        return self.source.read(path, box).to(self.arrays[path].dtype)
