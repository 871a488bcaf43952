"""How a model is cut over a mesh, as data: rules from logical axes to mesh axes."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from megatree.functional.param import Array, Box, Param
from megatree.parallel.errors import ShardingError
from megatree.parallel.mesh import Mesh
from megatree.parallel.order import Zigzag
from megatree.parallel.placement import Placement
from megatree.parallel.remat import Remat
from megatree.parallel.schedule import Schedule, one_f_one_b, validate
from megatree.parallel.schedule.grid import grid
from megatree.parallel.storage import LEVELS, Storage

PIPELINE = "pp"
"""The mesh axis over which stages are placed; it never enters a type."""


@dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axes that cut it, outer to inner; axes without a rule stay whole.

    `Rules(batch="dp", seq_res=("cp", "tp"), ffn="tp")`. `lower={"attention": Ring()}` says how an
    op runs whose operands the rules cut where it looks across (see `parallel.context`).
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]
    lower: tuple[tuple[str, Any], ...] = ()

    def __init__(
        self,
        *,
        lower: Any = None,
        **rules: str | tuple[str, ...] | None,
    ) -> None:
        def axes(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
            return () if value is None else (value,) if isinstance(value, str) else tuple(value)

        for name, how in (lower or {}).items():
            if not callable(getattr(how, "applies", None)):
                raise ShardingError(
                    f"rules: lower[{name!r}] is {how!r}, which lowers nothing. "
                    "Give AllGather(), Ring(), Ulysses() or Hierarchical(...)."
                )
        object.__setattr__(self, "table", tuple(sorted((k, axes(v)) for k, v in rules.items())))
        object.__setattr__(self, "lower", tuple(sorted((lower or {}).items())))

    def updated(
        self,
        *,
        lower: Any = None,
        **rules: str | tuple[str, ...] | None,
    ) -> "Rules":
        """Return the rules with some replaced or added."""
        return Rules(
            lower={**dict(self.lower), **(lower or {})},
            **{**dict(self.table), **rules},
        )

    def __str__(self) -> str:
        rules = [f"{name} -> {' '.join(axes) or 'whole'}" for name, axes in self.table]
        return ", ".join([*rules, *(f"{op} by {how}" for op, how in self.lower)])


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that cut logical axes over it.

    Args:
        mesh: the ranks.
        rules: logical axis -> mesh axes.
        placement: which stage runs which layer, if the mesh has a pipeline axis "pp"; None spreads
            the layers evenly over the schedule's stages.
        schedule: with "pp", a schedule or a function (ranks, microbatches) -> schedule.
        storage: mesh axes that cut parameters, gradients and optimizer state between uses.
        order: of the elements of cut sequences; None for the natural one.
        remat: what layers keep for the backward, and what that computes again.
    """

    mesh: Mesh = Mesh()  # noqa: RUF009 (frozen)
    rules: Rules = Rules()
    placement: Placement | None = None
    schedule: Schedule | Callable[[int, int], Schedule] | None = None
    storage: Storage = Storage()  # noqa: RUF009 (frozen)
    order: Zigzag | None = None
    remat: Remat = Remat()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if PIPELINE in self.mesh.sizes and self.schedule is None:
            raise ShardingError(
                f"layout: the mesh has pp={self.mesh.sizes[PIPELINE]} and no schedule. "
                "Give one, for example Layout(mesh, rules, schedule=one_f_one_b)."
            )
        if isinstance(self.schedule, Schedule):
            validate(self.schedule)
            if self.schedule.num_ranks != self.num_stage_ranks:
                self._refuse_counts(self.schedule, self.schedule.num_microbatches)
        for name, axes in self.rules.table:
            try:
                cut = self.axes(name)
            except ShardingError as error:
                raise ShardingError(f"rules: {name!r} -> {axes}: {error}") from None
            if PIPELINE in cut:
                raise ShardingError(
                    f"rules: {name!r} -> {axes}: stages are placed, not cut. "
                    "Take pp out of the rule and give a Placement."
                )
            if len(cut) != len(set(cut)):
                raise ShardingError(
                    f"rules: {name!r} -> {axes} uses a mesh axis twice ({' '.join(cut)}). "
                    "Name each mesh axis once."
                )
        self._check_order()
        if PIPELINE in self.stored.opt:
            raise ShardingError(
                f"storage: {self.storage}: a pipeline rank holds its own layers already. "
                "Take pp out of the storage."
            )

    def _check_order(self) -> None:
        if self.order is None:
            return
        over = self.mesh.axes(self.order.over)
        for name in self.order.axes:
            cut = self.axes(name)
            if cut and over and cut[: len(over)] != over:
                raise ShardingError(
                    f"order: {self.order}: axis {name!r} is cut over {' '.join(cut)}. Map it to "
                    f"{self.order.over!r} first in rules, or take it out of the order's axes."
                )

    @property
    def num_chunks(self) -> int:
        """The number of chunks of an ordered sequence: two per rank; 1 for natural order."""
        over = () if self.order is None else self.mesh.axes(self.order.over)
        return 2 * math.prod(self.sizes[a] for a in over) if over else 1

    def permuted(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Return the dims of an array that lie in the layout's order."""
        if self.order is None or self.num_chunks == 1:
            return ()
        return tuple(d for d, n in enumerate(names) if n in self.order.axes and self.axes(n))

    @property
    def stored(self) -> Storage:
        """The storage in atomic mesh axes larger than 1."""
        return Storage(
            *(
                tuple(a for axis in getattr(self.storage, level) for a in self.mesh.axes(axis))
                for level in LEVELS
            )
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size, as types see it: without the pipeline axis."""
        return {name: size for name, size in self.mesh.sizes.items() if name != PIPELINE}

    @property
    def num_stage_ranks(self) -> int:
        """The number of pipeline ranks."""
        return self.mesh.sizes.get(PIPELINE, 1)

    def schedule_for(self, num_microbatches: int) -> Schedule:
        """Return the schedule of a step.

        Raises:
            ShardingError: a fixed schedule has other ranks or microbatches.
        """
        ranks = self.num_stage_ranks
        if self.schedule is None:
            return one_f_one_b(1, num_microbatches)
        if not isinstance(self.schedule, Schedule):
            return self.schedule(ranks, num_microbatches)
        if self.schedule.num_microbatches != num_microbatches:
            self._refuse_counts(self.schedule, num_microbatches)
        return self.schedule

    def _refuse_counts(self, schedule: Schedule, num_microbatches: int) -> NoReturn:
        """Mark what a fixed schedule lacks, or has too much, for this mesh and step."""
        ranks = self.num_stage_ranks
        lacking = range(schedule.num_ranks, ranks)
        rows = [*schedule.ranks, *(() for _ in lacking)]
        marks = [(rank, 0) for rank in (*lacking, *range(ranks, schedule.num_ranks))]
        for rank, row in enumerate(schedule.ranks) if not marks else ():
            extra = [n for n, action in enumerate(row) if action.microbatch >= num_microbatches]
            marks.append((rank, extra[0] if extra else len(row)))
        raise ShardingError(
            f"schedule: is for {schedule.num_ranks} ranks and {schedule.num_microbatches} "
            f"microbatches, the mesh has pp={ranks} and the step {num_microbatches}. "
            f"Give a schedule of that size.\n{grid(rows, marks)}"
        )

    @property
    def stage_rank(self) -> tuple[int, ...]:
        """The pipeline rank that holds each stage."""
        if isinstance(self.schedule, Schedule):
            return self.schedule.stage_rank
        return self.schedule_for(4 * self.num_stage_ranks).stage_rank

    def axes(self, name: str) -> tuple[str, ...]:
        """Return the atomic mesh axes that cut a logical axis; () for one without a rule."""
        for known, axes in self.rules.table:
            if known == name:
                return tuple(a for axis in axes for a in self.mesh.axes(axis))
        return ()

    def spec(
        self, names: tuple[str, ...], shape: tuple[int, ...], place: str
    ) -> tuple[tuple[str, ...], ...]:
        """Return the mesh axes that cut each dim of an array.

        Raises:
            ShardingError: a mesh axis cuts two dims, or a dim does not divide.
        """
        spec = tuple(self.axes(name) for name in names)
        check_spec(spec, names, shape, self.sizes, place)
        for dim in self.permuted(names):
            if shape[dim] % self.num_chunks:
                raise ShardingError(
                    f"{place}: dim {dim} ({names[dim]!r}, size {shape[dim]}) does not divide into "
                    f"{self.num_chunks} zigzag chunks (two per rank of {self.order.over!r}). Pad "  # type: ignore[union-attr]
                    f"{names[dim]!r} to {-(-shape[dim] // self.num_chunks) * self.num_chunks}, or "
                    "leave the order natural: Layout(order=None)."
                )
        return spec

    def box(
        self, leaf: Param | Array, shape: tuple[int, ...], coords: Mapping[str, int], place: str
    ) -> Box:
        """Return one rank's box of an array of the given (padded) global shape."""
        spec = self.spec(leaf.names, shape, place)
        return spec_box(spec, shape, self.sizes, coords)

    def check_names(self, used: set[str]) -> None:
        """Refuse a rule for an axis that nothing in the program is called by."""
        unknown = sorted({name for name, _ in self.rules.table} - used)
        if unknown:
            hints = [difflib.get_close_matches(name, used, 1) for name in unknown]
            named = ", ".join(
                f"{name!r}" + (f" (did you mean {hint[0]!r}?)" if hint else "")
                for name, hint in zip(unknown, hints, strict=True)
            )
            raise ShardingError(
                f"rules: nothing in the program has an axis {named}. "
                f"Remove the rule or use one of {', '.join(sorted(used))}."
            )

    def __str__(self) -> str:
        order = f"; {self.order}" if self.order else ""
        remat = f"; remat {self.remat}" if self.remat else ""
        return f"{self.mesh}; {self.rules}{order}{remat}"


def check_spec(
    spec: tuple[tuple[str, ...], ...],
    names: tuple[str, ...],
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    place: str,
) -> None:
    """Refuse a spec that uses a mesh axis twice or cuts a dim that does not divide."""
    owner: dict[str, int] = {}
    for dim, axes in enumerate(spec):
        for axis in axes:
            if axis in owner:
                raise ShardingError(
                    f"{place}: mesh axis {axis!r} cuts dim {owner[axis]} "
                    f"({names[owner[axis]]!r}) and "
                    f"dim {dim} ({names[dim]!r}). Map one of the two to other mesh axes in rules."
                )
            owner[axis] = dim
        parts = math.prod(sizes[a] for a in axes)
        if shape[dim] % parts:
            name, size = names[dim], shape[dim]
            raise ShardingError(
                f"{place}: dim {dim} ({name!r}, size {size}) does not divide over mesh "
                f"{axes} (size {parts}). Pad {name!r} to {-(-size // parts) * parts}, or map it to "
                "fewer mesh axes in rules."
            )


def spec_box(
    spec: tuple[tuple[str, ...], ...],
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    coords: Mapping[str, int],
) -> Box:
    """Return the (start, stop) per dim of the piece at `coords`."""
    box = []
    for axes, size in zip(spec, shape, strict=True):
        index = 0
        for axis in axes:
            index = index * sizes[axis] + coords[axis]
        local = size // math.prod(sizes[a] for a in axes)
        box.append((index * local, (index + 1) * local))
    return tuple(box)


def local_shape(
    spec: tuple[tuple[str, ...], ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """Return the shape of one rank's piece."""
    return tuple(
        n // math.prod(sizes[a] for a in axes) for n, axes in zip(shape, spec, strict=True)
    )


def cut(
    x: Any, spec: tuple[tuple[str, ...], ...], sizes: Mapping[str, int], coords: Mapping[str, int]
) -> Any:
    """Return one rank's piece of a whole array (a tensor or a numpy array)."""
    box = spec_box(spec, tuple(x.shape), sizes, coords)
    return x[tuple(slice(a, b) for a, b in box)]
