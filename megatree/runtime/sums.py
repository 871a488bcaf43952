"""Gradients on their way into storage: added up over microbatches, reduced row by row."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatree.functional.product_sums import add_matrix_product
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import PIPELINE
from megatree.parallel.packing import Group, Leaf
from megatree.parallel.precision import Precision
from megatree.runtime.weights import Bucket

_SMALL = 1 << 16
"""Elements of a gradient up to which a launch costs more than the copy: a GPT-2 block has ten."""


class GradientSums:
    """A rank's gradients, in place: packed rows, whole or cut between microbatches.

    Rows that are stored whole are reduced once, after their last gradient, under the rest of the
    backward; rows that are stored cut (ZeRO-2 and 3) after every microbatch.

    Args:
        comm: this rank's collectives.
        groups: the plan of the buffers.
        uses: how many gradients of a row arrive per microbatch.
        precision: dtypes of the sums and of what travels.
    """

    def __init__(
        self,
        comm: RankComm,
        groups: tuple[Group, ...],
        uses: Mapping[Bucket, int],
        precision: Precision,
    ) -> None:
        self.comm, self.groups, self.uses = comm, groups, uses
        self.by_name = {group.name: group for group in groups}
        self.reduce_dtype = precision.reduce
        self.stored: dict[str, Tensor] = {
            group.name: group.allocate(precision.sums(group.dtype), comm.device, level="grads")
            for group in groups
        }
        self._left: dict[Bucket, int] = {}
        self._reached: dict[Bucket, set[str]] = {}
        self._growing: dict[Bucket, Tensor] = {}
        self._small: dict[Bucket, list[tuple[Tensor, Tensor]]] = {}
        self._waits: deque[Callable[[], object]] = deque()

    def begin(self, num_microbatches: int) -> None:
        """Start a step: every row waits for all its gradients.

        Rows that are stored whole keep what they held until a gradient replaces it, or `finish`
        finds that none came: zeroing and adding would move 3 times the bytes of a copy.
        """
        for group in self.groups:
            if group.num_parts("grads") > 1:
                self.stored[group.name].zero_()
        self._growing.clear()  # what a step that failed has left
        self._small.clear()
        self._reached = {bucket: set() for bucket in self.uses}
        self._left = {bucket: count * num_microbatches for bucket, count in self.uses.items()}

    def target(self, bucket: Bucket, leaf: Leaf) -> Tensor:
        """Return where a leaf's gradient is added, in the shape of `Group.unflattened`."""
        return self.by_name[bucket[0]].packed(self._row(bucket), leaf)

    def _row(self, bucket: Bucket) -> Tensor:
        """Return the packed row to which gradients are added."""
        group = self.by_name[bucket[0]]
        if group.num_parts("grads") == 1:
            return self.stored[group.name][bucket[1]]
        if bucket not in self._growing:
            like = self.stored[group.name]
            self._growing[bucket] = like.new_zeros(group.row_size)
        return self._growing[bucket]

    def add(self, bucket: Bucket, leaf: Leaf, grad: Tensor, *, arrivals: int = 1) -> None:
        """Add a leaf's gradient, which makes up so many of the row's arrivals."""
        target, value = self.target(bucket, leaf), self.by_name[bucket[0]].unflattened(grad, leaf)
        if not self._is_first(bucket, leaf):
            self._write(bucket)
            target.add_(value)
        elif value.numel() > _SMALL or value.dtype != target.dtype:
            _copy(target, value)
        else:
            self._small.setdefault(bucket, []).append((target, value))
        self._arrived(bucket, arrivals)

    def add_product(
        self,
        bucket: Bucket,
        leaves: Sequence[Leaf],
        left: Tensor,
        right: Tensor,
        *,
        arrivals: int | None = None,
    ) -> None:
        """Add `left.T @ right`, the gradient of leaves that are the rows of one matrix; the product
        itself adds, so nothing is rounded on the way.

        Args:
            bucket: where the leaves are, side by side.
            leaves: in the order of the rows.
            left: [tokens, rows].
            right: [tokens, columns].
            arrivals: what it makes up of the row's arrivals; None for one per leaf.
        """
        whole = self.by_name[bucket[0]].num_parts("opt") == 1
        if whole and len({leaf.path in self._reached[bucket] for leaf in leaves}) == 1:
            row = self._row(bucket)[leaves[0].start : leaves[-1].start + leaves[-1].size]
            target = row.view(left.shape[1], right.shape[1])
            fresh = [self._is_first(bucket, leaf) for leaf in leaves]
            add_matrix_product(target, left, right, fresh=fresh[0])
        else:
            # Storage cuts each leaf by itself: part after part a piece of every one.
            heights = [leaf.size // right.shape[1] for leaf in leaves]
            for leaf, rows in zip(leaves, left.split(heights, 1), strict=True):
                target, factors = self.target(bucket, leaf), (rows, right)
                if whole:
                    target = target.view(rows.shape[1], right.shape[1])
                else:
                    target, *factors = _in_parts(target, leaf, *factors)
                add_matrix_product(target, *factors, fresh=self._is_first(bucket, leaf))
        self._arrived(bucket, len(leaves) if arrivals is None else arrivals)

    def _write(self, bucket: Bucket) -> None:
        """Copy the small gradients of a row that have come, with one launch."""
        if pairs := self._small.pop(bucket, []):
            targets, values = zip(*pairs, strict=True)
            torch._foreach_copy_(targets, values)

    def _is_first(self, bucket: Bucket, leaf: Leaf) -> bool:
        """Whether what comes for a leaf replaces what is there; what comes later is added."""
        if self.by_name[bucket[0]].num_parts("grads") > 1 or leaf.path in self._reached[bucket]:
            return False
        self._reached[bucket].add(leaf.path)
        return True

    def _arrived(self, bucket: Bucket, arrivals: int) -> None:
        """Count gradients of a row, and start its reduction after the last."""
        if len(self._reached[bucket]) == len(self.by_name[bucket[0]].leaves):
            self._write(bucket)
        if not arrivals:
            return
        self._left[bucket] -= arrivals
        if self.by_name[bucket[0]].num_parts("grads") > 1:
            if self._left[bucket] % self.uses[bucket] == 0:
                self._scatter(bucket)
        elif self._left[bucket] == 0:
            self._write(bucket)
            self._sum(bucket)

    def _sum(self, bucket: Bucket) -> None:
        """Start the reduction of a row that is stored whole."""
        group, row = self.by_name[bucket[0]], bucket[1]
        buffer = self.stored[group.name][row]
        if group.num_parts("opt") == 1:
            if group.sync:
                self._waits.append(self._psum(buffer, group.sync))
            return
        part = buffer.view(group.num_parts("opt"), -1)[self.comm.index(group.axes("opt"))]
        wait = self._reduce(buffer, group.axes("opt"), group.sync)
        self._waits.append(lambda: part.copy_(wait()))

    def _clear(self, bucket: Bucket) -> None:
        """Write what has come of a row that is stored whole, and zero what no gradient reached."""
        self._write(bucket)
        for leaf in self.by_name[bucket[0]].leaves:
            if leaf.path not in self._reached[bucket]:
                self.target(bucket, leaf).zero_()

    def _scatter(self, bucket: Bucket) -> None:
        """Start the reduction of one microbatch's row into the part that is stored."""
        group, row = self.by_name[bucket[0]], bucket[1]
        part = self.stored[group.name][row]
        wait = self._reduce(self._growing.pop(bucket), group.axes("grads"), group.sync)
        while len(self._waits) > 1:  # one travels while the next grows
            self._waits.popleft()()
        self._waits.append(lambda: part.add_(wait()))

    def _psum(self, row: Tensor, axes: tuple[str, ...]) -> Callable[[], object]:
        if self.reduce_dtype is None or self.reduce_dtype == row.dtype:
            return self.comm.psum_async(row, axes)
        narrow = row.to(self.reduce_dtype)
        wait = self.comm.psum_async(narrow, axes)

        def done() -> None:
            wait()
            row.copy_(narrow)

        return done

    def _reduce(
        self, row: Tensor, axes: tuple[str, ...], sync: tuple[str, ...]
    ) -> Callable[[], Tensor]:
        """Start summing a packed row over the axes of `axes` that are pending; keep one part."""
        row = row if self.reduce_dtype is None else row.to(self.reduce_dtype)
        pending = tuple(axis for axis in axes if axis in sync)
        if pending == axes:
            return self.comm.psum_scatter_async(row, axes)
        total = self.comm.psum(row, pending) if pending else row  # the rest is the same already
        part = total.view(self.comm.size(axes), -1)[self.comm.index(axes)]
        return lambda: part

    def finish(self) -> None:
        """End a step: what no hook has started, the axes that storage does not cut, and leaves
        held by several stages.
        """
        for bucket, left in self._left.items():
            if self.by_name[bucket[0]].num_parts("grads") > 1:
                if bucket in self._growing:
                    self._scatter(bucket)
            else:
                self._clear(bucket)
                if left > 0:
                    self._sum(bucket)
        while self._waits:
            self._waits.popleft()()
        for group in self.groups:
            if group.num_parts("grads") > 1:
                self._finish_cut(group)
        shards = self.shards()
        for group in self.groups:
            rest = tuple(axis for axis in group.sync if axis not in group.stored.opt)
            if group.num_parts("opt") > 1 and rest:
                for row in shards[group.name]:
                    self._psum(row, rest)()
            if group.holders:
                part = shards[group.name]
                part.copy_(self.comm.psum_members(part.contiguous(), PIPELINE, group.holders))

    def _finish_cut(self, group: Group) -> None:
        """Reduce rows that are stored cut over the axes that cut the optimizer's state further."""
        rest = group.axes("opt")[len(group.axes("grads")) :]
        if not rest:
            return
        for row in self.stored[group.name]:
            wait = self._reduce(row, rest, group.sync)
            row.view(self.comm.size(rest), -1)[self.comm.index(rest)].copy_(wait())

    def shards(self) -> dict[str, Tensor]:
        """Return this rank's parts at the finest level after `finish`: views, [rows, elements]."""
        out = {}
        for group in self.groups:
            buffer = self.stored[group.name]
            rest = group.axes("opt")[len(group.axes("grads")) :]
            if rest:
                parts = buffer.unflatten(1, (-1, group.part_size("opt")))
                buffer = parts[:, self.comm.index(rest)]
            out[group.name] = buffer
        return out


def _copy(target: Tensor, value: Tensor) -> None:
    """Copy; on a GPU by a kernel, as the driver's copy runs at 1.9 of 3.0 TB/s (H100)."""
    if target.is_cuda and target.dtype == value.dtype:
        torch.mul(value, 1.0, out=target)
    else:
        target.copy_(value)


def _in_parts(
    target: Tensor, leaf: Leaf, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a leaf's packed place, and the factors of its gradient, as so many matrices as parts.

    Args:
        target: as `Group.packed` gives it.
        leaf: whose rows are those of `left`, and columns those of `right`.
        left, right: as in `GradientSums.add_product`.
    """
    parts = target.shape[leaf.dim]
    before = math.prod(leaf.shape[: leaf.dim])  # elements of the dims outside the one that is cut
    rows, columns = left.shape[1], right.shape[1]
    if before < rows:
        rows //= parts
        left = _parts_of(left, before, parts)
    else:
        columns //= parts
        right = _parts_of(right, before // left.shape[1], parts)
    return target.movedim(leaf.dim, 0).view(parts, rows, columns), left, right


def _parts_of(x: Tensor, before: int, parts: int) -> Tensor:
    """Cut the columns of [tokens, columns], dims of which the one after `before` elements falls
    into parts: [parts, tokens, columns of a part].
    """
    pieces = x.unflatten(1, (before, parts, -1))
    return pieces.movedim(2, 0).reshape(parts, x.shape[0], -1)
