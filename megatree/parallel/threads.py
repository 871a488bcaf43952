"""The simulator's ranks: threads of one process with a rendezvous per collective."""

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatree.parallel.comm import Axes, RankComm


class SimulationError(RuntimeError):
    """Ranks that do not agree on a collective, or that wait for each other."""


class Threads:
    """All ranks of a mesh as threads; names mismatched collectives and deadlocks at once."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.points = list(itertools.product(*(range(n) for n in sizes.values())))
        self.rank_of = {point: rank for rank, point in enumerate(self.points)}
        self.changed = threading.Condition()
        self.slots: dict[Any, dict[int, tuple[Any, Any]]] = {}
        self.reads: dict[Any, int] = {}
        self.waiting: dict[int, str] = {}
        self.mail: dict[tuple[int, int], list[Tensor | None]] = {}
        self.error: BaseException | None = None
        self.live = 0

    def run(self, fn: Callable[["ThreadComm"], Any]) -> list[Any]:
        """Run `fn(comm)` on every rank and return the results by rank.

        Raises:
            The first exception of any rank, with the rank in a note.
        """
        results: list[Any] = [None] * len(self.points)
        self.live = len(self.points)

        def rank_main(rank: int) -> None:
            try:
                results[rank] = fn(ThreadComm(self, rank))
            except BaseException as error:
                with self.changed:
                    if self.error is None:
                        error.add_note(f"on simulated rank {rank} of {len(self.points)}")
                        self.error = error
                    self.changed.notify_all()
            finally:
                with self.changed:
                    self.live -= 1
                    self._check_deadlock()
                    self.changed.notify_all()

        grad = torch.is_grad_enabled()

        def with_grad_mode(rank: int) -> None:
            with torch.set_grad_enabled(grad):
                rank_main(rank)

        threads = [threading.Thread(target=with_grad_mode, args=(r,)) for r in range(self.live)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        return results

    def fail(self, message: str) -> NoReturn:
        self.error = self.error or SimulationError(message)
        self.changed.notify_all()
        raise self.error

    def _check_deadlock(self) -> None:
        if self.error is None and self.live and len(self.waiting) == self.live:
            places = [f"rank {r} waits in {w}" for r, w in sorted(self.waiting.items())]
            gone = sorted(set(range(len(self.points))) - set(self.waiting))
            places += [f"ranks {gone} have finished"] if gone else []
            self.error = SimulationError(
                f"deadlock: {'; '.join(places)}. Make the same collectives on every rank: mask a "
                "value, never branch around one."
            )

    def block(self, rank: int, what: str, ready: Callable[[], bool]) -> None:
        """Wait (lock held) until `ready`, or until another rank failed or all ranks wait."""
        while not ready():
            if self.error is not None:
                raise SimulationError("another rank failed") from self.error
            self.waiting[rank] = what
            self._check_deadlock()
            if self.error is not None:
                self.changed.notify_all()
                raise self.error
            self.changed.wait()
            self.waiting.pop(rank, None)
        self.waiting.pop(rank, None)


class ThreadComm(RankComm):
    """One simulated rank."""

    def __init__(self, world: Threads, rank: int) -> None:
        self.world, self.rank = world, rank
        self.device = torch.device("cpu")
        self.sizes = world.sizes
        self.coords = dict(zip(world.sizes, world.points[rank], strict=True))
        self.calls: dict[tuple[int, ...], int] = {}
        self.counts: dict[str, int] = {}
        self.received: dict[int, int] = {}

    def members(self, axes: Axes) -> list[int]:
        """Return the ranks of the group over `axes`, in the order of the tuple."""
        out = []
        for point in itertools.product(*(range(self.sizes[a]) for a in axes)):
            at = {**self.coords, **dict(zip(axes, point, strict=True))}
            out.append(self.world.rank_of[tuple(at[a] for a in self.sizes)])
        return out

    def exchange(self, kind: str, axes: Axes, send: list[Any], tag: Any = None) -> list[Any]:
        """Give one tensor to every rank of the group over `axes` and get one from each."""
        return self.exchange_in(self.members(axes), kind, axes, send, tag)

    def exchange_in(
        self, group: list[int], kind: str, axes: Axes, send: list[Any], tag: Any = None
    ) -> list[Any]:
        """Give one tensor to every rank of a group and get one from each."""
        world = self.world
        me, name = group.index(self.rank), tuple(sorted(group))
        call = self.calls[name] = self.calls.get(name, 0) + 1
        self.counts[kind] = self.counts.get(kind, 0) + 1
        label = (kind, axes, tag)
        # Copied before anybody reads it: the sender may overwrite its tensor once it returns.
        copies = {id(x): x.detach().clone() for x in send if x is not None}
        send = [None if x is None else copies[id(x)] for x in send]
        with world.changed:
            slot = world.slots.setdefault((name, call), {})
            slot[self.rank] = (label, send)
            if len({entry[0] for entry in slot.values()}) > 1:
                said = ", ".join(
                    f"rank {r}: {e[0][0]}({'.'.join(e[0][1])}){e[0][2] or ''}"
                    for r, e in sorted(slot.items())
                )
                world.fail(f"mismatched collectives in group {group}, call {call}: {said}.")
            if len(slot) == len(group):
                for rank in group:  # they can run from now on, even before they wake
                    world.waiting.pop(rank, None)
                world.changed.notify_all()
            world.block(
                self.rank, f"{kind}({'.'.join(axes)}), call {call}", lambda: len(slot) == len(group)
            )
            got = [slot[rank][1][me] for rank in group]
            self.world.reads[name, call] = self.world.reads.get((name, call), 0) + 1
            if self.world.reads[name, call] == len(group):  # everybody has taken its part
                del world.slots[name, call], self.world.reads[name, call]
        return got

    def psum(self, x: Tensor, axes: Axes) -> Tensor:
        parts = self.exchange("psum", axes, [x] * self.size(axes), tuple(x.shape))
        return sum(parts[1:], parts[0])

    def pmax(self, x: Tensor, axes: Axes) -> Tensor:
        parts = self.exchange("pmax", axes, [x] * self.size(axes), tuple(x.shape))
        return torch.stack(parts).amax(0)

    def all_gather(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        parts = self.exchange("all_gather", axes, [x] * self.size(axes), (tuple(x.shape), dim))
        return torch.cat(parts, dim)

    def psum_scatter(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        send = list(x.chunk(self.size(axes), dim))
        parts = self.exchange("psum_scatter", axes, send, (tuple(x.shape), dim))
        return sum(parts[1:], parts[0])

    def all_to_all(self, x: Tensor, axes: Axes, split_dim: int, concat_dim: int) -> Tensor:
        send = list(x.chunk(self.size(axes), split_dim))
        tag = (tuple(x.shape), split_dim, concat_dim)
        return torch.cat(self.exchange("all_to_all", axes, send, tag), concat_dim)

    def all_to_all_v(self, x: Tensor, axes: Axes, send: list[int], recv: list[int]) -> Tensor:
        parts = self.exchange("all_to_all_v", axes, list(x.split(send)))
        got = [len(part) for part in parts]
        if got != list(recv):
            with self.world.changed:
                self.world.fail(
                    f"all_to_all_v({'.'.join(axes)}): rank {self.rank} expects {list(recv)} rows, "
                    f"its peers send {got}."
                )
        return torch.cat(parts)

    def ppermute(self, x: Tensor, axes: Axes, shift: int) -> Tensor:
        n, i = self.size(axes), self.index(axes)
        send = [x if j == (i + shift) % n else None for j in range(n)]
        return self.exchange("ppermute", axes, send, (tuple(x.shape), shift % n))[(i - shift) % n]

    def psum_members(self, x: Tensor, axis: str, members: tuple[int, ...]) -> Tensor:
        group = [self.peer(axis, member) for member in members]
        parts = self.exchange_in(group, "psum", (axis,), [x] * len(group), tuple(x.shape))
        return sum(parts[1:], parts[0])

    def peer(self, axis: str, coordinate: int) -> int:
        """Return the rank at a coordinate of one axis, all others as here."""
        at = {**self.coords, axis: coordinate}
        return self.world.rank_of[tuple(at[a] for a in self.sizes)]

    def send_async(self, x: Tensor, axis: str, to: int) -> Callable[[], None]:
        world, peer = self.world, self.peer(axis, to)
        with world.changed:
            world.mail.setdefault((self.rank, peer), []).append(x.detach().clone())
            world.waiting.pop(peer, None)  # it may run from now on, even before it wakes
            world.changed.notify_all()
        return lambda: None

    def recv_async(
        self, shape: tuple[int, ...], dtype: torch.dtype, axis: str, source: int
    ) -> Callable[[], Tensor]:
        world, peer = self.world, self.peer(axis, source)
        number = self.received[peer] = self.received.get(peer, 0) + 1

        def wait() -> Tensor:
            with world.changed:
                channel = world.mail.setdefault((peer, self.rank), [])
                what = f"receive {number} from rank {peer}"
                world.block(self.rank, what, lambda: len(channel) >= number)
                x, channel[number - 1] = channel[number - 1], None
                if x is None or tuple(x.shape) != shape or x.dtype != dtype:
                    found = None if x is None else list(x.shape)
                    world.fail(
                        f"{what}: rank {self.rank} expects {dtype} {list(shape)}, gets {found}."
                    )
            return x

        return wait
