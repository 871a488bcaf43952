"""Sets that grow together: which things are connected by pairs."""

from collections import defaultdict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class UnionFind(Generic[T]):
    """Connects things pair by pair.

    >>> joined = UnionFind()
    >>> joined.join(1, 2); joined.join(3, 2); joined.join(8, 9)
    >>> joined.groups()
    [[1, 2, 3], [8, 9]]
    """

    def __init__(self) -> None:
        self._parent: dict[T, T] = {}

    def join(self, a: T, b: T) -> None:
        """Connect two things."""
        self._parent[self._root(b)] = self._root(a)

    def groups(self) -> list[list[T]]:
        """Return the connected sets, in the order in which their members came."""
        found: dict[T, list[T]] = defaultdict(list)
        for member in self._parent:
            found[self._root(member)].append(member)
        return list(found.values())

    def _root(self, member: T) -> T:
        self._parent.setdefault(member, member)
        path = []
        while (parent := self._parent[member]) != member:
            path.append(member)
            member = parent
        for passed in path:
            self._parent[passed] = member
        return member
