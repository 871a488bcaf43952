"""Which parts of a score matrix a mask leaves: tiles of queries and sources, from positions."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) pairs of positions, in the order in which their elements lie."""

Kind = Literal["full", "causal", "masked"]


@dataclass(frozen=True, kw_only=True)
class Mask:
    """What a query sees by positions.

    Args:
        causal: sources at its own position and before.
        window: sources less than this many tokens away; None for all.
    """

    causal: bool
    window: int | None = None

    @property
    def hides(self) -> bool:
        """Whether anything is hidden at all."""
        return self.causal or self.window is not None

    def __call__(self, queries: Tensor, sources: Tensor) -> Bool[Tensor, "*b t s"]:
        """Return what queries at some positions see of sources at others."""
        distance = queries.unsqueeze(-1) - sources.unsqueeze(-2)
        if self.window is None:
            return distance >= 0
        near = distance < self.window
        return near & (distance >= 0) if self.causal else near & (distance > -self.window)

    def span(self, start: int, stop: int, size: int) -> tuple[int, int]:
        """Return the positions that queries at start .. stop - 1 see any of."""
        reach = size if self.window is None else self.window - 1
        return max(0, start - reach), stop if self.causal else min(size, stop + reach)


@dataclass(frozen=True)
class Tile:
    """Queries q[0] .. q[1] - 1 against sources s[0] .. s[1] - 1, by their places in the pieces.

    Args:
        q, s: (start, stop).
        kind: every query sees every source, or as many as its own number in the tile counts, or
            what the mask says of positions.
        q_at, s_at: positions of the first query and source (of a tile of consecutive ones).
    """

    q: tuple[int, int]
    s: tuple[int, int]
    kind: Kind
    q_at: int
    s_at: int


@lru_cache
def tiles(queries: Ranges, sources: Ranges, mask: Mask) -> tuple[Tile, ...]:
    """Return the tiles in which a piece of the queries sees something of a piece of the sources.

    Without a window, ranges are cut at each other's ends, so that a tile is full or causal and
    never needs a mask; neighbours that one kernel can take are joined. With a window, queries go
    in rows of the window's size, each with the sources in its reach.
    """
    if not mask.hides:
        return (Tile((0, _length(queries)), (0, _length(sources)), "full", 0, 0),)
    if mask.window is None:
        return tuple(_joined([t for t in _causal_tiles(queries, sources) if t is not None]))
    return tuple(_window_tiles(queries, sources, mask))


def visible(queries: Ranges, sources: Ranges, mask: Mask) -> list[tuple[int, int]]:
    """Return the parts of a piece of the sources, by place, that some query sees."""
    if not mask.hides:
        return [(0, _length(sources))]
    size = max(stop for _, stop in (*queries, *sources))
    found: list[tuple[int, int]] = []
    place = 0
    for c, d in sources:
        for a, b in queries:
            lo, hi = mask.span(a, b, size)
            lo, hi = max(lo, c), min(hi, d)
            if lo < hi:
                found.append((place + lo - c, place + hi - c))
        place += d - c
    return union(found)


def union(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return disjoint (start, stop) pairs in rising order that hold the same numbers."""
    out: list[tuple[int, int]] = []
    for lo, hi in sorted(parts):
        if out and lo <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], hi)
        else:
            out.append((lo, hi))
    return out


def take(ranges: Ranges, parts: Sequence[tuple[int, int]]) -> Ranges:
    """Return the positions of parts (by place) of a piece."""
    out: list[tuple[int, int]] = []
    for lo, hi in parts:
        place = 0
        for a, b in ranges:
            x, y = max(lo, place), min(hi, place + b - a)
            if x < y:
                out.append((a + x - place, a + y - place))
            place += b - a
    return tuple(out)


def tile_mask(tile: Tile, mask: Mask, device: torch.device) -> Bool[Tensor, "t s"]:
    """Return the mask of a tile of consecutive positions."""
    queries = torch.arange(tile.q_at, tile.q_at + tile.q[1] - tile.q[0], device=device)
    sources = torch.arange(tile.s_at, tile.s_at + tile.s[1] - tile.s[0], device=device)
    return mask(queries, sources)


def _length(ranges: Ranges) -> int:
    return sum(b - a for a, b in ranges)


def _cut(ranges: Ranges, at: set[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (place, start, stop) of ranges that are cut at some positions."""
    place = 0
    for a, b in ranges:
        edges = [a, *sorted(x for x in at if a < x < b), b]
        for lo, hi in itertools.pairwise(edges):
            yield place, lo, hi
            place += hi - lo


def _causal_tiles(queries: Ranges, sources: Ranges) -> Iterator[Tile]:
    edges = {x for pair in (*queries, *sources) for x in pair}
    for q, a, b in _cut(queries, edges):
        row: list[Tile] = []
        for s, c, d in _cut(sources, edges):
            if c > a:
                continue
            kind: Kind = "causal" if c == a else "full"
            tile = Tile((q, q + b - a), (s, s + d - c), kind, a, c)
            if row and kind == row[-1].kind == "full" and row[-1].s[1] == s:
                row[-1] = Tile(tile.q, (row[-1].s[0], tile.s[1]), kind, a, row[-1].s_at)
            else:
                row.append(tile)
        yield from row


def _joined(found: list[Tile]) -> Iterator[Tile]:
    """Join full tiles over the same sources whose queries lie side by side."""
    full = sorted((t for t in found if t.kind == "full"), key=lambda t: (t.s, t.q))
    while full:
        tile = full.pop(0)
        while full and full[0].s == tile.s and full[0].q[0] == tile.q[1]:
            tile = Tile((tile.q[0], full.pop(0).q[1]), tile.s, "full", tile.q_at, tile.s_at)
        yield tile
    yield from (t for t in found if t.kind == "causal")


def _window_tiles(queries: Ranges, sources: Ranges, mask: Mask) -> Iterator[Tile]:
    assert mask.window is not None
    size = max(stop for _, stop in (*queries, *sources))
    q = 0
    for a, b in queries:
        step = max(mask.window, -(-(b - a) // 32))
        for lo in range(a, b, step):
            hi = min(lo + step, b)
            first, last = mask.span(lo, hi, size)
            s = 0
            for c, d in sources:
                x, y = max(first, c), min(last, d)
                if x < y:
                    part = (s + x - c, s + y - c)
                    yield Tile((q + lo - a, q + hi - a), part, "masked", lo, x)
                s += d - c
        q += b - a
