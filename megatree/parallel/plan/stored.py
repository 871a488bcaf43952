"""What storage costs: bytes that a rank keeps between steps, and the collectives it needs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatree.parallel.packing import Group
from megatree.parallel.precision import Precision


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """Bytes of one rank's buffers.

    Args:
        params, grads: as they lie between steps and microbatches.
        opt: moments, master weights and float32 copies of narrow gradients.
        gathered: rows of parameters that are whole at once while they are used (ZeRO-3), and the
            row of gradients that grows before it is reduced (ZeRO-2 and 3).
    """

    params: int
    grads: int
    opt: int
    gathered: int


def stored_bytes(
    groups: Sequence[Group], precision: Precision, moments: Sequence[torch.dtype]
) -> StoredBytes:
    """Add up the buffers of one rank.

    Args:
        groups: the plan of its buffers.
        precision: what is stored in which dtype.
        moments: dtypes of the optimizer's states (float64 for float64 parameters).
    """
    params = grads = opt = 0
    rows: dict[str, int] = {}
    growing = 0
    for group in groups:
        sums = precision.sums(group.dtype)
        params += group.num_rows * group.part_size("params") * group.dtype.itemsize
        grads += group.num_rows * group.part_size("grads") * sums.itemsize
        part = group.num_rows * group.part_size("opt")
        opt += part * sum(8 if group.dtype == torch.float64 else m.itemsize for m in moments)
        if precision.master and precision.is_narrow(group.dtype):
            opt += part * 4
        if precision.main_grads and precision.is_narrow(sums):
            opt += part * 4
        if group.num_parts("params") > 1:
            rows[group.unit] = rows.get(group.unit, 0) + group.row_size * group.dtype.itemsize
        if group.num_parts("grads") > 1:
            growing = max(growing, group.row_size * sums.itemsize)
    largest = sorted(rows.values())[-1] if rows else 0
    return StoredBytes(params=params, grads=grads, opt=opt, gathered=2 * largest + growing)


@dataclass(frozen=True, kw_only=True)
class StorageCollective:
    """A collective of storage, per step and rank.

    Args:
        source: the unit and the number of its leaves that travel together.
        kind: "psum", "psum_scatter" or "all_gather".
        axes: mesh axes.
        bytes: of one rank's larger side.
        count: how often per step.
        phase: "forward", "backward" or "sync".
    """

    source: str
    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    phase: str


def storage_collectives(
    group: Group, precision: Precision, num_microbatches: int
) -> Iterator[StorageCollective]:
    """Yield what a group's gradients and parameters do in a step, beside leaves held by stages.

    Gathers for use are the most there are: a row that is whole at the turn from a microbatch's
    forward to its backward is not gathered again.
    """
    sums = precision.sums(group.dtype)
    wire = (precision.reduce or sums).itemsize
    source = f"{group.unit} ({len(group.leaves)} leaves)"
    grads, opt, params = (group.axes(level) for level in ("grads", "opt", "params"))

    def reduce(axes: tuple[str, ...], size: int, count: int) -> Iterator[StorageCollective]:
        pending = tuple(axis for axis in axes if axis in group.sync)
        kind = "psum_scatter" if pending == axes else "psum"
        if pending:
            yield StorageCollective(
                source=source, kind=kind, axes=pending, bytes=size * wire, count=count, phase="sync"
            )

    rows = group.num_rows
    if not opt:
        yield from (
            StorageCollective(
                source=source,
                kind="psum",
                axes=group.sync,
                bytes=group.row_size * wire,
                count=rows,
                phase="sync",
            )
            for _ in range(bool(group.sync))
        )
        return
    if grads:
        yield from reduce(grads, group.row_size, rows * num_microbatches)
    if opt[len(grads) :]:
        yield from reduce(opt[len(grads) :], group.part_size("grads"), rows)
    if rest := tuple(axis for axis in group.sync if axis not in opt):
        yield StorageCollective(
            source=source,
            kind="psum",
            axes=rest,
            bytes=group.part_size("opt") * wire,
            count=rows,
            phase="sync",
        )
    if opt[len(params) :]:
        yield StorageCollective(
            source=source,
            kind="all_gather",
            axes=opt[len(params) :],
            bytes=group.part_size("params") * group.dtype.itemsize,
            count=rows,
            phase="sync",
        )
    for phase in ("forward", "backward") if params else ():
        yield StorageCollective(
            source=source,
            kind="all_gather",
            axes=params,
            bytes=group.row_size * group.dtype.itemsize,
            count=rows * num_microbatches,
            phase=phase,
        )
