"""The collectives that a body or an op may speak, over logical axes; on one device all are
trivial.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Comm(Protocol):
    """Collectives over logical axes, differentiable: each has exactly one stateless dual.

    psum <-> psum, all_gather <-> psum_scatter, all_to_all reversed, ppermute(s) <-> ppermute(-s).
    """

    @property
    def plans(self) -> bool:
        """Whether shapes are all there is: a body whose shapes depend on data assumes the mean."""
        ...

    def axis_size(self, axis: str) -> int:
        """Return the number of ranks along a logical axis (1 where it is not cut)."""
        ...

    def axis_index(self, axis: str) -> int:
        """Return this rank's position along a logical axis."""
        ...

    def ranges(
        self, axis: str, length: int, index: int | None = None
    ) -> tuple[tuple[int, int], ...]:
        """Return which elements of the whole axis a rank's piece of `length` elements holds.

        (start, stop) pairs, in the order in which they lie; of the rank at position `index` of the
        axis, or of this one.
        """
        ...

    def psum(self, x: Tensor, axis: str) -> Tensor:
        """Sum over the ranks of an axis."""
        ...

    def pmax(self, x: Tensor, axis: str) -> Tensor:
        """Take the maximum over the ranks of an axis; carries no gradient."""
        ...

    def all_gather(self, x: Tensor, axis: str, dim: int) -> Tensor:
        """Join the ranks' pieces along a dim."""
        ...

    def psum_scatter(self, x: Tensor, axis: str, dim: int) -> Tensor:
        """Sum over the ranks and keep this rank's piece along a dim."""
        ...

    def all_to_all(self, x: Tensor, axis: str, split_dim: int, concat_dim: int) -> Tensor:
        """Cut along one dim, exchange the pieces, join them along another."""
        ...

    def all_to_all_v(self, x: Tensor, axis: str, send: list[int], recv: list[int]) -> Tensor:
        """Exchange rows in unequal numbers: `send[i]` to rank i, `recv[i]` from it."""
        ...

    def all_to_all_async(
        self, x: Tensor, axis: str, split_dim: int, concat_dim: int
    ) -> Callable[[], Tensor]:
        """Start `all_to_all`; the returned function waits for what arrives.

        In the backward the gradient sets off where this one arrived, and is waited for where it
        set off: what is computed in between runs meanwhile both times.
        """
        ...

    def all_to_all_v_async(
        self, x: Tensor, axis: str, send: list[int], recv: list[int]
    ) -> Callable[[], Tensor]:
        """Start `all_to_all_v`; see `all_to_all_async`."""
        ...

    def ppermute(self, x: Tensor, axis: str, shift: int) -> Tensor:
        """Hand to the rank `shift` places on, take from the one `shift` places back."""
        ...

    def ppermute_async(self, x: Tensor, axis: str, shift: int) -> Callable[[], Tensor]:
        """Start `ppermute`; the returned function waits for what arrives. Carries no gradient."""
        ...


class Single:
    """One device: every axis has size 1, every collective is the identity."""

    plans = False

    def axis_size(self, axis: str) -> int:
        return 1

    def axis_index(self, axis: str) -> int:
        return 0

    def ranges(
        self, axis: str, length: int, index: int | None = None
    ) -> tuple[tuple[int, int], ...]:
        at = self.axis_index(axis) if index is None else index
        return ((at * length, (at + 1) * length),)

    def psum(self, x: Tensor, axis: str) -> Tensor:
        return x

    def pmax(self, x: Tensor, axis: str) -> Tensor:
        return x.detach()

    def all_gather(self, x: Tensor, axis: str, dim: int) -> Tensor:
        return x

    def psum_scatter(self, x: Tensor, axis: str, dim: int) -> Tensor:
        return x

    def all_to_all(self, x: Tensor, axis: str, split_dim: int, concat_dim: int) -> Tensor:
        return x

    def all_to_all_v(self, x: Tensor, axis: str, send: list[int], recv: list[int]) -> Tensor:
        return x

    def all_to_all_async(
        self, x: Tensor, axis: str, split_dim: int, concat_dim: int
    ) -> Callable[[], Tensor]:
        return lambda: x

    def all_to_all_v_async(
        self, x: Tensor, axis: str, send: list[int], recv: list[int]
    ) -> Callable[[], Tensor]:
        return lambda: x

    def ppermute(self, x: Tensor, axis: str, shift: int) -> Tensor:
        return x

    def ppermute_async(self, x: Tensor, axis: str, shift: int) -> Callable[[], Tensor]:
        return lambda: x


SINGLE = Single()
