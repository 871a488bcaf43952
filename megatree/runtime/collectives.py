"""Collectives over processes: gloo and NCCL groups of a mesh, as a comm."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatree.parallel.comm import Axes, RankComm
from megatree.parallel.mesh import Mesh


def _job_timeout(device: torch.device) -> timedelta:
    """Return how long a collective of the job may wait; torch gives new groups half an hour."""
    return dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]


class ProcessComm(RankComm):
    """One process of an initialised process group as a rank of a mesh.

    Groups are made by `prepare`, a collective call: every rank asks for the same axes in the same
    order. torch sorts the ranks of a group, so a tuple of axes in another order than the mesh's
    permutes the chunks.
    """

    def __init__(self, mesh: Mesh, device: torch.device | str = "cpu") -> None:
        if dist.get_world_size() != mesh.num_ranks:
            raise ValueError(
                f"Mesh: {mesh} has {mesh.num_ranks} ranks, {dist.get_world_size()} processes run. "
                "Start as many processes as the mesh has ranks, or change the mesh."
            )
        self.mesh = mesh
        self.sizes = mesh.sizes
        self.coords = mesh.coords(dist.get_rank())
        self.device = torch.device(device)
        self.timeout = _job_timeout(self.device)
        self.groups: dict[Axes, tuple[Any, str]] = {}
        self.member_groups: dict[tuple[str, tuple[int, ...]], Any] = {}
        self.orders: dict[Axes, tuple[list[int], list[int]] | None] = {}

    def prepare(self, axes_list: Iterable[Axes]) -> None:
        """Make the groups of these tuples of axes; every rank must call it alike."""
        for axes in axes_list:
            if not axes or axes in self.orders:
                continue
            ordered = tuple(a for a in self.sizes if a in axes)
            if ordered not in self.groups:
                self.groups[ordered] = self._new_group(ordered)
            self.groups[axes] = self.groups[ordered]
            ranks = self.mesh.ranks(axes, self.coords)
            to_sorted = [ranks.index(r) for r in sorted(ranks)]
            same = to_sorted == list(range(len(ranks)))
            to_tuple = [to_sorted.index(i) for i in range(len(ranks))]
            self.orders[axes] = None if same else (to_sorted, to_tuple)

    def _new_group(self, axes: Axes) -> tuple[Any, str]:
        mine: Any = None
        seen: set[tuple[int, ...]] = set()
        for rank in range(self.mesh.num_ranks):
            ranks = tuple(self.mesh.ranks(axes, self.mesh.coords(rank)))
            if ranks in seen:
                continue
            seen.add(ranks)
            group = dist.new_group(list(ranks), timeout=self.timeout)
            if dist.get_rank() in ranks:
                mine = group
        return mine, mine.group_name

    def _group(self, axes: Axes) -> str:
        try:
            return self.groups[axes][1]
        except KeyError:
            raise ValueError(
                f"comm: no process group over {axes}; there are {list(self.groups)}. "
                "Call prepare([axes]) on every rank first."
            ) from None

    def psum(self, x: Tensor, axes: Axes) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x, "sum", self._group(axes)))

    def pmax(self, x: Tensor, axes: Axes) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x, "max", self._group(axes)))

    def all_gather(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        return self._all_gather(x, axes, dim)()

    def all_gather_async(self, x: Tensor, axes: Axes) -> Callable[[], Tensor]:
        return self._all_gather(x, axes, 0)

    def _all_gather(self, x: Tensor, axes: Axes, dim: int) -> Callable[[], Tensor]:
        ops = torch.ops._c10d_functional
        n, order = self.size(axes), self.orders[axes]
        x = x if x.dim() else x.reshape(1)
        if self.device.type != "cpu":
            y = ops.all_gather_into_tensor(x, n, self._group(axes))
        else:
            # Not the op above: gloo's two threads write the name of their last work with no lock,
            # and that op's, "ALLGATHER_COALESCED", is the one long enough to lie on the heap: two
            # that end together free it twice (torch 2.13).
            y = x.new_empty(n * x.shape[0], *x.shape[1:])
            ops.all_gather_into_tensor_out(x, n, self._group(axes), out=y)

        def wait() -> Tensor:
            whole = ops.wait_tensor(y)
            if dim == 0 and order is None:
                return whole
            parts = whole.chunk(n, 0)
            return torch.cat(parts if order is None else [parts[i] for i in order[1]], dim)

        return wait

    def psum_scatter(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        return self._psum_scatter(x, axes, dim)()

    def psum_scatter_async(self, x: Tensor, axes: Axes) -> Callable[[], Tensor]:
        return self._psum_scatter(x, axes, 0)

    def _psum_scatter(self, x: Tensor, axes: Axes, dim: int) -> Callable[[], Tensor]:
        ops = torch.ops._c10d_functional
        n, order = self.size(axes), self.orders[axes]
        if dim or order is not None:
            parts = x.chunk(n, dim)
            x = torch.cat(parts if order is None else [parts[i] for i in order[0]], 0)
        if self.device.type != "cpu":
            y = ops.reduce_scatter_tensor(x, "sum", n, self._group(axes))
            return lambda: ops.wait_tensor(y)
        # gloo would sum all of it on every rank: 1.6 against 1.0 ms of CPU for 2 MiB on 2 ranks.
        rows = [x.shape[0] // n] * n
        got = ops.all_to_all_single(x, rows, rows, self._group(axes))

        def wait() -> Tensor:
            first, *others = ops.wait_tensor(got).chunk(n, 0)
            return sum(others, first)

        return wait

    def all_to_all(self, x: Tensor, axes: Axes, split_dim: int, concat_dim: int) -> Tensor:
        return self.all_to_all_async(x, axes, split_dim, concat_dim)()

    def all_to_all_async(
        self, x: Tensor, axes: Axes, split_dim: int, concat_dim: int
    ) -> Callable[[], Tensor]:
        ops = torch.ops._c10d_functional
        n, order = self.size(axes), self.orders[axes]
        parts = x.chunk(n, split_dim)
        send = torch.cat(parts if order is None else [parts[i] for i in order[0]], 0)
        rows = [send.shape[0] // n] * n
        got = ops.all_to_all_single(send, rows, rows, self._group(axes))

        def wait() -> Tensor:
            parts = ops.wait_tensor(got).chunk(n, 0)
            return torch.cat(parts if order is None else [parts[i] for i in order[1]], concat_dim)

        return wait

    def all_to_all_v(self, x: Tensor, axes: Axes, send: list[int], recv: list[int]) -> Tensor:
        return self.all_to_all_v_async(x, axes, send, recv)()

    def all_to_all_v_async(
        self, x: Tensor, axes: Axes, send: list[int], recv: list[int]
    ) -> Callable[[], Tensor]:
        ops = torch.ops._c10d_functional
        order = self.orders[axes]
        if order is not None:
            parts = x.split(send)
            x = torch.cat([parts[i] for i in order[0]])
            send, recv = [send[i] for i in order[0]], [recv[i] for i in order[0]]
        y = ops.all_to_all_single(x, recv, send, self._group(axes))

        def wait() -> Tensor:
            rows = ops.wait_tensor(y)
            if order is None:
                return rows
            parts = rows.split(recv)
            return torch.cat([parts[i] for i in order[1]])

        return wait

    def ppermute(self, x: Tensor, axes: Axes, shift: int) -> Tensor:
        return self.ppermute_async(x, axes, shift)()

    def ppermute_async(self, x: Tensor, axes: Axes, shift: int) -> Callable[[], Tensor]:
        ranks = self.mesh.ranks(axes, self.coords)
        n, i = len(ranks), self.index(axes)
        if shift % n == 0:
            return x.clone
        group = self.groups[axes][0]
        out = torch.empty_like(x)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, ranks[(i + shift) % n], group),
                dist.P2POp(dist.irecv, out, ranks[(i - shift) % n], group),
            ]
        )

        def wait(keep: Tensor = x) -> Tensor:  # the tensor must live until it is sent
            for work in works:
                work.wait()
            return out

        return wait

    def prepare_members(self, axis: str, members: tuple[int, ...]) -> None:
        if (axis, members) in self.member_groups:
            return
        others = tuple(a for a in self.sizes if a != axis)
        for rank in self.mesh.ranks(others, {**self.coords, axis: 0}) if others else [0]:
            at = self.mesh.coords(rank)
            ranks = [self.mesh.ranks((axis,), at)[member] for member in members]
            group = dist.new_group(ranks, timeout=self.timeout)
            if dist.get_rank() in ranks:
                self.member_groups[axis, members] = group
        self.member_groups.setdefault((axis, members), None)

    def psum_members(self, x: Tensor, axis: str, members: tuple[int, ...]) -> Tensor:
        out = x.clone()
        dist.all_reduce(out, group=self.member_groups[axis, members])
        return out

    def send_async(self, x: Tensor, axis: str, to: int) -> Callable[[], None]:
        work = dist.isend(x, self.mesh.ranks((axis,), self.coords)[to])

        def wait(keep: Tensor = x) -> None:  # the tensor must live until it is sent
            if work is not None:
                work.wait()

        return wait

    def recv_async(
        self, shape: tuple[int, ...], dtype: torch.dtype, axis: str, source: int
    ) -> Callable[[], Tensor]:
        out = torch.empty(shape, dtype=dtype, device=self.device)
        work = dist.irecv(out, self.mesh.ranks((axis,), self.coords)[source])

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return out

        return wait

    def psum_async(self, x: Tensor, axes: Axes) -> Callable[[], None]:
        work = dist.all_reduce(x, group=self.groups[axes][0], async_op=True)
        return lambda: None if work is None else work.wait()
