"""The processes of a job as a value, so that `io` never touches a process group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank, number of ranks, and three ways to meet; every rank calls them in the same order.

    Args:
        rank: this process, 0 <= rank < size.
        size: number of processes.
        barrier: returns when every rank has called it.
        gather: small picklable value -> the list of every rank's value, on every rank.
        broadcast: small picklable value -> the value of rank 0, on every rank.
    """

    rank: int
    size: int
    barrier: Callable[[], None]
    gather: Callable[[Any], list[Any]]
    broadcast: Callable[[Any], Any]

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"World: rank {self.rank} is not in a world of {self.size} ranks. "
                f"Give a rank from 0 to {self.size - 1}."
            )

    @staticmethod
    def single() -> World:
        """Return the world of one process.

        >>> World.single().gather("a")
        ['a']
        """
        return World(
            rank=0,
            size=1,
            barrier=lambda: None,
            gather=lambda value: [value],
            broadcast=lambda value: value,
        )

    def agree(self, fn: Callable[[], T]) -> T:
        """Run `fn` on every rank and return this rank's value; a failure on one is raised on all.

        Law: either every rank returns or every rank raises, so none waits for one that has left.

        Raises:
            Exception: what `fn` raised here; elsewhere an OSError or ValueError with its text.
        """
        value, failure = None, None
        try:
            value = fn()
        except Exception as error:
            failure = error
        told = failure and (isinstance(failure, OSError), str(failure))
        everywhere = self.gather(told)
        if failure is not None:
            raise failure
        for rank, text in enumerate(everywhere):
            if text is not None:
                kind = OSError if text[0] else ValueError
                raise kind(f"rank {rank}: {text[1]}")
        return cast(T, value)

    def on_first(self, fn: Callable[[], T]) -> T | None:
        """Run `fn` on rank 0 alone and return its value there; it fails everywhere, as `agree`."""
        return self.agree(lambda: fn() if self.rank == 0 else None)
