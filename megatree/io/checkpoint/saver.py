"""Checkpoints one behind the other, written while training goes on."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from megatree.io.checkpoint.manifest import BLOCK_BYTES, place, rank_file
from megatree.io.checkpoint.piece import Piece
from megatree.io.checkpoint.place import PathLike, Place
from megatree.io.checkpoint.retention import Retention, retain
from megatree.io.checkpoint.ring import Ring
from megatree.io.checkpoint.save import SavePlan, Sharing, carry_out, plan_save
from megatree.io.checkpoint.snapshot import Snapshot
from megatree.io.checkpoint.write import data_of, straight_from
from megatree.io.world import World

_THREADS_BEHIND = 1  # that write beside a step: each takes a core, which the step may need
_LAST_WAIT_S = 60.0
"""Seconds that a run which fails waits for a save under way: its peers may be gone."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is complete.

    Args:
        path: of it.
        step: as given to `Saver.save`.
        stall_s: seconds that it took from its caller.
        total_s: seconds until it was complete.
        removed: steps whose checkpoints were removed after it.
    """

    path: str
    step: int
    stall_s: float
    total_s: float
    removed: tuple[int, ...] = ()


class Saver:
    """Saves a run's checkpoints and removes old ones; every rank has one and calls it alike.

    With `host_bytes`, a save copies this rank's share into host memory and returns; the disk is
    waited for in the background. What exceeds the memory is written before the save returns, and a
    save waits for the one before it. A failure in the background is raised by the next call.
    `begin` does not wait for the copy either: a step that reads the same tensors runs beside it.

    Args:
        world: the processes, over connections that nothing else uses while a save is under way.
        host_bytes: host memory for copies, on every rank; 0 waits for the disk.
        block_bytes: bytes under one checksum.
        retention: which checkpoints stay.
    """

    def __init__(
        self,
        world: World,
        *,
        host_bytes: int = 0,
        block_bytes: int = BLOCK_BYTES,
        retention: Retention = Retention(),  # noqa: B008 (frozen)
    ) -> None:
        if 0 < host_bytes < block_bytes:
            raise ValueError(
                f"Saver: host_bytes {host_bytes} hold no block of {block_bytes} bytes. Give at "
                f"least {block_bytes}, or 0 to wait for the disk."
            )
        self.world, self.host_bytes, self.block_bytes = world, host_bytes, block_bytes
        self.retention = retention
        self.ring: Ring | None = None
        self._thread: threading.Thread | None = None
        self._snapshot: Snapshot | None = None
        self._sharing: Sharing | None = None
        self._failure: BaseException | None = None
        self._done: list[Saved] = []

    def save(
        self,
        path: PathLike,
        pieces: Iterable[Piece],
        *,
        step: int,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the pieces as they are now; see `checkpoint.save`.

        Raises:
            ValueError, OSError: as `checkpoint.save` does; of the save before this one, too.
        """
        self.begin(path, pieces, step=step, extra=extra)()

    def begin(
        self,
        path: PathLike,
        pieces: Iterable[Piece],
        *,
        step: int,
        extra: Mapping[str, Any] | None = None,
    ) -> Callable[[], None]:
        """Begin to save the pieces as they are now.

        Law: the caller changes none of their tensors, and frees no memory that they view, before
        it has called what is returned; from then on no change shows.

        Returns:
            settle: waits until the copy is taken; in the thread that changes the tensors.

        Raises:
            ValueError, OSError: as `checkpoint.save` does; of the save before this one, too.
        """
        self.wait()
        begun = time.perf_counter()
        plan = plan_save(
            path,
            pieces,
            world=self.world,
            extra=extra,
            block_bytes=self.block_bytes,
            before=self._sharing,
        )
        self._sharing = plan.sharing
        if not self.host_bytes:
            carry_out(plan, straight_from(plan.share, plan.held, self.block_bytes), self.world)
            self._finish(plan.final, step, begun, time.perf_counter() - begun)
            return _nothing
        chunks = place(plan.share, rank_file(self.world.rank))
        data = data_of(plan.share, plan.held)
        pinned = any(x.device.type == "cuda" for x in data)
        ring = self._room(sum(-(-chunk.nbytes // 64) * 64 for chunk in chunks), pinned)
        snapshot = Snapshot(ring, chunks, data, self.block_bytes)
        snapshot.stall_s = time.perf_counter() - begun
        self._snapshot = snapshot
        self._thread = threading.Thread(
            target=self._background, args=(plan, snapshot, step, begun), daemon=True
        )
        self._thread.start()
        threading.Thread(target=snapshot.take, daemon=True).start()
        return snapshot.settle

    def poll(self) -> list[Saved]:
        """Return what was completed since the last call; waits for nothing.

        Raises:
            ValueError, OSError: a save in the background failed.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Wait until no save is under way.

        Raises:
            ValueError, OSError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._snapshot is not None:
            self._snapshot.settle()
            self._snapshot = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None and issubclass(kind, Exception):
            self._thread.join(_LAST_WAIT_S)

    def _room(self, nbytes: int, pinned: bool) -> Ring:
        """Return the memory for a share: kept from save to save, as making it takes time."""
        needed = max(min(nbytes, self.host_bytes), min(self.block_bytes, max(nbytes, 64)))
        if self.ring is None or self.ring.nbytes < needed or self.ring.closed:
            self.ring = None  # before the new one is made
            self.ring = Ring(needed, pinned=pinned)
        return self.ring

    def _background(self, plan: SavePlan, snapshot: Snapshot, step: int, begun: float) -> None:
        try:
            carry_out(plan, snapshot.blocks, self.world, num_threads=_THREADS_BEHIND)
            self._finish(plan.final, step, begun, snapshot.stall_s)
        except BaseException as error:
            snapshot.ring.close()
            self._failure = error

    def _finish(self, final: Place, step: int, begun: float, stall_s: float) -> None:
        total = time.perf_counter() - begun
        parent = str(final).removesuffix("/" + final.name)
        removed = self.world.on_first(lambda: retain(parent, self.retention, newest=step))
        self._done.append(
            Saved(
                path=str(final),
                step=step,
                stall_s=stall_s,
                total_s=total,
                removed=tuple(removed or ()),
            )
        )


def _nothing() -> None:
    """Settle what was waited for."""
