"""What a value is on each mesh axis: sharded, invariant, replicated or a pending sum."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from megatree.parallel.layout import local_shape

I, R, P, S = "I", "R", "P", "S"  # noqa: E741 (the paper's letters)
_DUAL = {I: I, R: P, P: R}


@dataclass(frozen=True, slots=True)
class ShardType:
    """The type of a value: global shape, what cuts each dim, and a state for the other mesh axes.

    | state | the ranks of the axis hold | cotangent |
    |---|---|---|
    | S(dim) | slices of the value | S(dim) |
    | I invariant | the same value | I: the same |
    | R replicated | the same value, used differently by each rank | P: a pending sum |
    | P partial | terms of a pending sum | R |

    Args:
        shape: global shape.
        dtype: dtype.
        spec: per dim, the mesh axes that cut it, outer to inner.
        kinds: (mesh axis, "I" | "R" | "P") of the mesh axes that cut no dim, in mesh order.
        grad: whether a gradient flows to the value; without one it is never R.
        permuted: the dims whose elements lie in the layout's order (see `parallel.order`), not in
            that of the whole value.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: tuple[tuple[str, ...], ...]
    kinds: tuple[tuple[str, str], ...]
    grad: bool = False
    permuted: tuple[int, ...] = ()

    def state(self, axis: str) -> str:
        """Return "S", "I", "R" or "P" for a mesh axis."""
        for name, kind in self.kinds:
            if name == axis:
                return kind
        return S

    def axes_in(self, kind: str) -> tuple[str, ...]:
        """Return the mesh axes on which the value is I, R or P."""
        return tuple(axis for axis, k in self.kinds if k == kind)

    @property
    def dual(self) -> "ShardType":
        """The type of the cotangent."""
        return replace(self, kinds=tuple((axis, _DUAL[kind]) for axis, kind in self.kinds))

    def with_kinds(self, kinds: Mapping[str, str]) -> "ShardType":
        """Return the type with the states of some uncut mesh axes replaced."""
        return replace(self, kinds=tuple((a, kinds.get(a, k)) for a, k in self.kinds))

    def local_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of one rank's piece."""
        return local_shape(self.spec, self.shape, sizes)

    def __str__(self) -> str:
        dims = ", ".join(
            f"{n}{'~' * (dim in self.permuted)}{'/' * bool(axes)}{'.'.join(axes)}"
            for dim, (n, axes) in enumerate(zip(self.shape, self.spec, strict=True))
        )
        kinds = "".join(f" {kind}({axis})" for axis, kind in self.kinds if kind != I)
        return f"{str(self.dtype).removeprefix('torch.')}[{dims}]{kinds}"


def make_type(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    spec: tuple[tuple[str, ...], ...],
    sizes: Mapping[str, int],
    *,
    kinds: Mapping[str, str] | None = None,
    grad: bool = False,
    permuted: tuple[int, ...] = (),
) -> ShardType:
    """Build a type; mesh axes that cut no dim and have no given kind are I, and R needs a
    gradient.
    """
    used = {axis for axes in spec for axis in axes}
    given = kinds or {}
    states = tuple(
        (axis, I if not grad and given.get(axis, I) == R else given.get(axis, I))
        for axis in sizes
        if axis not in used
    )
    return ShardType(shape, dtype, spec, states, grad, permuted)
