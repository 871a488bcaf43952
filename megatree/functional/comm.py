"""The collectives that a body or an op may speak, over logical axes; on one device all are trivial."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Comm(Protocol):
    """Collectives over logical axes, differentiable: each has exactly one stateless dual.

    psum <-> psum, all_gather <-> psum_scatter, all_to_all reversed, ppermute(s) <-> ppermute(-s).
    """

    def axis_size(self, axis: str) -> int: ...
    def axis_index(self, axis: str) -> int: ...
    def psum(self, x: Tensor, axis: str) -> Tensor: ...
    def pmax(self, x: Tensor, axis: str) -> Tensor: ...
    def all_gather(self, x: Tensor, axis: str, dim: int) -> Tensor: ...
    def psum_scatter(self, x: Tensor, axis: str, dim: int) -> Tensor: ...
    def all_to_all(self, x: Tensor, axis: str, split_dim: int, concat_dim: int) -> Tensor: ...
    def all_to_all_v(self, x: Tensor, axis: str, send: list[int], recv: list[int]) -> Tensor: ...
    def ppermute(self, x: Tensor, axis: str, shift: int) -> Tensor: ...


class Single:
    """One device: every axis has size 1, every collective is the identity."""

    def axis_size(self, axis: str) -> int:
        return 1

    def axis_index(self, axis: str) -> int:
        return 0

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

    def ppermute(self, x: Tensor, axis: str, shift: int) -> Tensor:
        return x


SINGLE = Single()
