"""Named axes over ranks: a mesh as a value, and its refinement into atomic axes."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatree.parallel.errors import ShardingError

STANDARD = ("pp", "dp", "ep", "cp", "tp")
"""Axes that a rule may name though the mesh lacks them (size 1), outermost first."""


@dataclass(frozen=True)
class Mesh:
    """Ranks as a grid with named axes; an axis is a tuple of *atomic* axes.

    `Mesh(dp=2, tp=4)` orders standard axes pp, dp, ep, cp, tp from outer to inner (tp has fast
    links) and puts others where they were given. Ranks count row-major.

    Args:
        atoms: (name, size) of the atomic axes, outer to inner.
        names: axis name -> names of its atomic axes, outer to inner.
    """

    atoms: tuple[tuple[str, int], ...]
    names: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(self, **sizes: int) -> None:
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"Mesh: axis {name!r} has size {size}. Give at least 1.")
        slots = iter(sorted((n for n in sizes if n in STANDARD), key=STANDARD.index))
        order = [next(slots) if name in STANDARD else name for name in sizes]
        self._set(tuple((name, sizes[name]) for name in order), tuple((n, (n,)) for n in order))

    def _set(self, atoms: tuple[tuple[str, int], ...], names: tuple[tuple[str, Any], ...]) -> None:
        object.__setattr__(self, "atoms", atoms)
        object.__setattr__(self, "names", names)

    @property
    def sizes(self) -> dict[str, int]:
        """Atomic axis -> size, for those larger than 1, outer to inner."""
        return {name: size for name, size in self.atoms if size > 1}

    @property
    def num_ranks(self) -> int:
        """The number of ranks."""
        return math.prod(size for _, size in self.atoms)

    def axes(self, name: str) -> tuple[str, ...]:
        """Return the atomic axes (larger than 1) of a mesh axis, of "tp/kv" those of tp not in kv.

        Raises:
            ShardingError: the mesh has no such axis and it is not a standard one.
        """
        if "/" in name:
            whole, part = name.split("/")
            return tuple(a for a in self.axes(whole) if a not in self.axes(part))
        table = dict(self.names)
        if name not in table:
            if name in STANDARD:
                return ()
            raise ShardingError(
                f"mesh axis {name!r}: the mesh has {', '.join(table) or 'no axes'} (and "
                f"{', '.join(STANDARD)} of size 1 where absent). Add it to the Mesh or "
                f"rename it in Rules."
            )
        return tuple(a for a in table[name] if a in self.sizes)

    def refine(self, **parts: int) -> "Mesh":
        """Name innermost parts of the mesh, splitting axes where needed.

        Each part is the innermost block of ranks of that size, pp excluded: on Mesh(dp=8, tp=8),
        `refine(ep=16, kv=2)` makes kv the inner two of tp's ranks, ep all of tp and part of dp.

        Args:
            parts: new axis name -> size; each must be reachable by splitting one axis.

        Raises:
            ShardingError: a part's size does not fit the axes' sizes, or its name is taken.
        """
        mesh = self
        taken = sorted(set(parts) & {name for name, _ in self.names})
        if taken:
            raise ShardingError(
                f"refine({taken[0]}={parts[taken[0]]}): the mesh has an axis {taken[0]!r} already. "
                "Give the part a name of its own."
            )
        for name, size in sorted(parts.items(), key=lambda item: item[1]):
            mesh = mesh._refine(name, size)
        return mesh

    def _refine(self, name: str, size: int) -> "Mesh":
        inner: list[str] = []
        left = size
        atoms, table = list(self.atoms), dict(self.names)
        for at in range(len(atoms) - 1, -1, -1):
            axis, n = atoms[at]
            if left == 1 or axis == "pp":
                break
            if left % n == 0:
                inner.insert(0, axis)
                left //= n
            elif n % left == 0:
                # Named by the ranks it and all parts inside span: a second split is not "tp.2" too.
                part = f"{axis}.{left * _product_of_parts(axis, atoms)}"
                atoms[at : at + 1] = [(axis, n // left), (part, left)]
                inner.insert(0, part)
                table = {
                    key: tuple(x for a in value for x in ((a, part) if a == axis else (a,)))
                    for key, value in table.items()
                }
                left = 1
            else:
                break
        if left != 1:
            raise ShardingError(
                f"refine({name}={size}): no block of {size} inner ranks divides the axes "
                f"{dict(self.atoms)} (pp excluded). Choose a size that divides them."
            )
        table[name] = tuple(inner)
        refined = Mesh()
        refined._set(tuple(atoms), tuple(table.items()))
        return refined

    def coords(self, rank: int) -> dict[str, int]:
        """Return a rank's coordinate on every atomic axis larger than 1."""
        out: dict[str, int] = {}
        for name, size in reversed(self.atoms):
            rank, at = divmod(rank, size)
            if size > 1:
                out[name] = at
        return dict(reversed(out.items()))

    def ranks(self, axes: tuple[str, ...], coords: Mapping[str, int]) -> list[int]:
        """Return the ranks of the group over `axes` at `coords`, in the order of the tuple."""
        sizes = self.sizes
        out = []
        for point in itertools.product(*(range(sizes[a]) for a in axes)):
            at = {**coords, **dict(zip(axes, point, strict=True))}
            rank = 0
            for name, size in sizes.items():
                rank = rank * size + at[name]
            out.append(rank)
        return out

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.atoms) or "one device"


def _product_of_parts(axis: str, atoms: list[tuple[str, int]]) -> int:
    """Return how many ranks the parts split off an axis so far span."""
    return math.prod(size for name, size in atoms if name.startswith(f"{axis}."))
