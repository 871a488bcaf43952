"""Attention in blocks: sources arrive part by part, results merge by their log-sum-exp."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatree.functional.attention_kernels import (
    TileKernel,
    choose_tile_kernel,
    tile_backward,
    tile_forward,
    wide,
)
from megatree.functional.attention_tiles import (
    Mask,
    Ranges,
    Tile,
    take,
    tile_mask,
    tiles,
    union,
    visible,
)
from megatree.functional.comm import Comm
from megatree.functional.contraction import einsum
from megatree.functional.documents import check_segment_ids

Transport = Literal["ring", "gather"]
_SOURCE_DIM = 2  # of k and v as kernels take them, [b, g, s, k]


def blocks_signature(ranks: Sequence[int], names: Sequence[str]) -> str:
    """Type the operands that are there; the sources' label is that of the queries."""
    labels = {
        "q": "b t g r k!",
        "k": "b t g k!",
        "v": "b t g w!",
        "positions": "b t",
        "source_positions": "b s!",
        "segment_ids": "b t",
        "source_segment_ids": "b s!",
        "sinks": "g r",
    }
    words = [
        labels[name].removeprefix("b ") if rank == 1 else labels[name]
        for name, rank in zip(names, ranks, strict=True)
    ]
    return f"{', '.join(words)} -> b t g r w!"


def attention_blocks(
    comm: Comm,
    q: Float[Tensor, "b t g r k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t g w"],
    positions: Int[Tensor, "*b t"] | None = None,
    source_positions: Int[Tensor, "*b s"] | None = None,
    segment_ids: Int[Tensor, "*b t"] | None = None,
    source_segment_ids: Int[Tensor, "*b s"] | None = None,
    sinks: Float[Tensor, "g r"] | None = None,
    *,
    transport: Transport = "ring",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> Float[Tensor, "b t g r w"]:
    """Attend from a rank's queries to the sources of all ranks of "t"; see `F.attention`.

    Law: the value and all gradients are those of whole operands. Only k and v travel, with as many
    heads as they have, and in backward their gradients, in float32 or better; what is kept for the
    backward is this rank's own q, k, v, result and log-sum-exp. With a window and plain positions,
    only the sources in reach of some query travel. A tile that a mask hides is not computed, but
    no message is skipped: every rank sends and receives the same number of times.

    Args:
        q, k, v: this rank's pieces.
        positions, segment_ids: of this rank's queries; None for plain positions, one document.
        source_positions, source_segment_ids: of the sources of all ranks, in the order in which
            ranks and their pieces lie.
        sinks: logits that join every softmax, per query head.
        transport: "ring" hands pieces on from rank to rank while they are used; "gather" takes all
            at once, forward and again in backward.
        causal, window, scale, kernel: as in `F.attention`.

    Reference: Liu et al. 2023, arXiv:2310.01889 (ring); Dao 2023, arXiv:2307.08691 (the backward
    of a tile from the merged log-sum-exp).
    """
    call = _Call(
        comm=comm,
        transport=transport,
        mask=Mask(causal=causal, window=window),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        kernel=kernel,
        spread=True,
        plain=positions is None,
    )
    ints = (positions, source_positions, segment_ids, source_segment_ids)
    if source_segment_ids is not None and positions is None:
        _check_documents(comm, k.shape[1], source_segment_ids)
    return _Blocks.apply(call, q, k, v, sinks, *ints)


def _check_documents(comm: Comm, length: int, segment_ids: Tensor) -> None:
    """Refuse documents in several parts; on a GPU, where a look would wait, masks honour them."""
    if segment_ids.device.type != "cpu" or _is_fake(segment_ids):
        return
    held = (comm.ranges("t", length, j) for j in range(comm.axis_size("t")))
    places = torch.cat([torch.arange(a, b) for ranges in held for a, b in ranges])
    check_segment_ids(segment_ids[..., places.argsort()], "attention")


def blocks_of_whole_sources(
    comm: Comm,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ints: tuple[Tensor | None, ...],
    sinks: Tensor | None,
    *,
    mask: Mask,
    scale: float,
    kernel: str,
) -> Tensor:
    """Attend from a rank's queries to sources that are all here, in natural order."""
    call = _Call(
        comm=comm,
        transport="gather",
        mask=mask,
        scale=scale,
        kernel=kernel,
        spread=False,
        plain=ints[0] is None,
    )
    return _Blocks.apply(call, q, k, v, sinks, *ints)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static in a call.

    Args:
        comm: speaks "t".
        transport: how sources come.
        mask: by positions.
        scale: of the scores.
        kernel: as asked for.
        spread: whether the ranks of "t" hold pieces of the sources; else all of them.
        plain: whether positions are the places of elements in the whole sequence.
    """

    comm: Comm
    transport: Transport
    mask: Mask
    scale: float
    kernel: str
    spread: bool
    plain: bool


@dataclass
class _Rows:
    """One rank's queries and what masks need to know of all sources.

    Args:
        call: what is static.
        queries: where the queries are, if positions are plain.
        positions, source_positions, segments, source_segments: as given.
        device: of the operands.
    """

    call: _Call
    queries: Ranges
    positions: Tensor | None
    source_positions: Tensor | None
    segments: Tensor | None
    source_segments: Tensor | None
    device: torch.device

    def work(self, sources: Ranges, start: int) -> Iterator[tuple[Tile, Tensor | None]]:
        """Yield the tiles of a piece of the sources with their masks.

        Args:
            sources: where they are, if positions are plain.
            start: place of the piece among all sources.
        """
        mask = self.call.mask
        if self.positions is not None:
            found: tuple[Tile, ...] = tiles(self.queries, sources, Mask(causal=False))
        else:
            found = tiles(self.queries, sources, mask)
        for tile in found:
            seen = self._seen(tile, start)
            if seen is not None and self.device.type == "cpu" and not _is_fake(seen):
                if not seen.any():
                    continue
                if seen.all():
                    seen, tile = None, replace(tile, kind="full")
            yield tile, seen

    def _seen(self, tile: Tile, start: int) -> Tensor | None:
        mask, seen = self.call.mask, None
        q, s = slice(*tile.q), slice(start + tile.s[0], start + tile.s[1])
        if self.positions is not None:
            assert self.source_positions is not None
            if mask.hides:
                seen = mask(self.positions[..., q], self.source_positions[..., s])
        elif tile.kind == "masked":
            seen = tile_mask(tile, mask, self.device)
        if self.segments is not None:
            assert self.source_segments is not None
            same = self.segments[..., q].unsqueeze(-1) == self.source_segments[..., s].unsqueeze(-2)
            if tile.kind == "causal":
                same = same & tile_mask(tile, mask, self.device)
            seen = same if seen is None else seen & same
        return seen


class _Blocks(torch.autograd.Function):
    """Forward and backward by hand, so that collectives run alike on every rank."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        *ints: Tensor | None,
    ) -> Tensor:
        heads = q.shape[2:4]
        rows = _Rows(call, call.comm.ranges("t", q.shape[1]), *_four(ints), q.device)
        qs, kv = _heads_first(q), _packed(k, v)
        total = Merged(qs, v.shape[-1])
        for piece, ranges, start in _sources(call, kv, k.shape[1]):
            if _only_shapes(q):
                continue
            ks, vs = _unpacked(piece, k, v)
            for tile, seen in rows.work(ranges, start):
                at, there = slice(*tile.q), slice(*tile.s)
                causal = tile.kind == "causal" and seen is None
                kernel = _kernel(call, q, v, seen)
                part = tile_forward(
                    kernel, qs[:, :, at], ks[:, :, there], vs[:, :, there], seen,
                    causal=causal, scale=call.scale,
                )  # fmt: skip
                total.add(tile.q, *part)
        out, lse = total.finish_with(None if sinks is None else sinks.flatten())
        out = out.to(q.dtype)
        ctx.call, ctx.heads = call, heads
        ctx.save_for_backward(q, k, v, out, lse, sinks, *ints)
        return _heads_last(out, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        q, k, v, out, lse, sinks, *ints = ctx.saved_tensors
        call: _Call = ctx.call
        g, qs, kv = _heads_first(grads[0]), _heads_first(q), _packed(k, v)
        rows = _Rows(call, call.comm.ranges("t", q.shape[1]), *_four(ints), q.device)
        dtype = wide(q.dtype)
        dq = Added(torch.empty(qs.shape, dtype=dtype, device=q.device))

        def add(piece: Tensor, ranges: Ranges, start: int, grad: Gradient) -> Tensor:
            """Add what these sources give to dq, and to their own gradient, which is returned."""
            if _only_shapes(q):
                return grad.buffer()
            ks, vs = _unpacked(piece, k, v)
            sums: list[Added] = []
            for tile, seen in rows.work(ranges, start):
                at, there = slice(*tile.q), slice(*tile.s)
                kernel = _kernel(call, q, v, seen)
                parts = tile_backward(
                    kernel, g[:, :, at], qs[:, :, at], ks[:, :, there], vs[:, :, there],
                    out[:, :, at], lse[:, :, at], seen,
                    causal=tile.kind == "causal" and seen is None, scale=call.scale,
                )  # fmt: skip
                sums = sums or grad.sums(k, v)  # after the first tile: it may still be arriving
                dq.add(tile.q, parts[0])
                sums[0].add(tile.s, parts[1])
                sums[1].add(tile.s, parts[2])
            for part in sums or grad.sums(k, v):
                part.finish()
            return grad.buffer()

        dkv = _backward_sources(call, kv, k.shape[1], dtype, add)
        dk, dv = (einsum("b g s k -> b s g k", x) for x in _unpacked(dkv, k, v))
        ds = None
        if sinks is not None:
            delta = (g.to(dtype) * out.to(dtype)).sum(-1)
            p = torch.exp(sinks.to(dtype).flatten()[:, None] - lse)
            ds = -(p * delta).sum((0, 2)).view_as(sinks).to(sinks.dtype)
        dq_out = _heads_last(dq.finish(), ctx.heads).to(q.dtype)
        none = (None,) * len(ints)
        return None, dq_out, dk.to(k.dtype), dv.to(v.dtype), ds, *none


class Added:
    """A sum of parts of a buffer along dim 2; what is written first is copied, not added to zeros.

    Args:
        buffer: where it is made.
        blank: whether the buffer holds nothing yet.
    """

    def __init__(self, buffer: Tensor, *, blank: bool = True) -> None:
        self.buffer = buffer
        self.untouched = [(0, buffer.shape[2])] if blank else []

    def add(self, at: tuple[int, int], part: Tensor) -> None:
        """Add a part at (start, stop)."""
        target = self.buffer[:, :, slice(*at)]
        if self.claim(at):
            target.copy_(part)
        else:
            target.add_(part)

    def claim(self, at: tuple[int, int]) -> bool:
        """Whether nothing was written to a part yet; if some of it was, the rest becomes zero."""
        inside = [(max(lo, at[0]), min(hi, at[1])) for lo, hi in self.untouched]
        inside = [(lo, hi) for lo, hi in inside if lo < hi]
        left = [(lo, min(hi, at[0])) for lo, hi in self.untouched if lo < at[0]]
        self.untouched = left + [(max(lo, at[1]), hi) for lo, hi in self.untouched if hi > at[1]]
        if inside == [at]:
            return True
        for part in inside:
            self.clear(part)
        return False

    def clear(self, part: tuple[int, int]) -> None:
        """Write what a part is to which nothing was added."""
        self.buffer[:, :, slice(*part)] = 0

    def finish(self) -> Tensor:
        """Return the sum."""
        for part in self.untouched:
            self.clear(part)
        self.untouched = []
        return self.buffer


class Merged(Added):
    """Results over parts of the sources, merged by their log-sum-exp, in float32 or better.

    Args:
        q: queries, heads first.
        value_dim: width of a value.
    """

    def __init__(self, q: Tensor, value_dim: int) -> None:
        dtype = wide(q.dtype)
        super().__init__(torch.empty((*q.shape[:-1], value_dim), dtype=dtype, device=q.device))
        self.lse = torch.empty(q.shape[:-1], dtype=dtype, device=q.device)

    def add(self, at: tuple[int, int], part: Tensor, part_lse: Tensor | None = None) -> None:  # noqa: D102
        assert part_lse is not None
        out, lse = self.buffer[:, :, slice(*at)], self.lse[:, :, slice(*at)]
        if self.claim(at):
            out.copy_(part)
            lse.copy_(part_lse)
            return
        # out + (part - out) * sigmoid(part_lse - lse); of nothing and nothing, nothing.
        share = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)
        out.lerp_(part.to(out.dtype), share.to(out.dtype).unsqueeze(-1))
        lse.copy_(torch.logaddexp(lse, part_lse.to(lse.dtype)))

    def clear(self, part: tuple[int, int]) -> None:  # noqa: D102
        super().clear(part)
        self.lse[:, :, slice(*part)] = -torch.inf

    def finish_with(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return result and log-sum-exp, with logits of sinks [heads], which bring no value."""
        out = self.finish()
        if sinks is not None:
            logits = sinks.to(self.lse.dtype)[:, None]
            out.mul_(torch.sigmoid(self.lse - logits).unsqueeze(-1))
            self.lse = torch.logaddexp(self.lse, logits.expand(self.lse.shape))
        return out, self.lse


class Gradient:
    """The gradient of a piece of the sources: blank, or what other ranks made of it so far.

    Args:
        make: gives the buffer, once.
        blank: whether it holds nothing yet.
    """

    def __init__(self, make: Callable[[], Tensor], *, blank: bool) -> None:
        self.buffer, self.blank = cache(make), blank

    def sums(self, k: Tensor, v: Tensor) -> list[Added]:
        """Return the parts for k and for v."""
        return [Added(x, blank=self.blank) for x in _unpacked(self.buffer(), k, v)]


# -- how sources come -------------------------------------------------------------------------


def _sources(call: _Call, kv: Tensor, length: int) -> Iterator[tuple[Tensor, Ranges, int]]:
    """Yield (k and v, their positions, place of the first among all sources), own ones first."""
    comm, n = call.comm, call.comm.axis_size("t")
    if not call.spread or n == 1:
        yield kv, ((0, length),) if not call.spread else comm.ranges("t", length), 0
        return
    me = comm.axis_index("t")
    hops = _hops(call, length)
    if hops is not None:
        waits = [comm.ppermute_async(_parts(kv, parts), "t", d) for d, parts in hops]
        yield kv, comm.ranges("t", length), me * length
        for (d, parts), wait in zip(hops, waits, strict=True):
            j = (me - d) % n
            piece = wait()
            yield from _each(piece, comm.ranges("t", length, j), parts, j * length)
    elif call.transport == "gather":
        whole = comm.all_gather(kv, "t", -2)
        ranges = tuple(r for j in range(n) for r in comm.ranges("t", length, j))
        yield whole, ranges, 0
    else:
        for step in range(n):
            wait = comm.ppermute_async(kv, "t", 1) if step < n - 1 else None
            j = (me - step) % n
            yield kv, comm.ranges("t", length, j), j * length
            kv = kv if wait is None else wait()


def _backward_sources(
    call: _Call,
    kv: Tensor,
    length: int,
    dtype: torch.dtype,
    add: Callable[[Tensor, Ranges, int, Gradient], Tensor],
) -> Tensor:
    """Let `add` see all sources once more; return the gradient of this rank's own."""
    comm, n = call.comm, call.comm.axis_size("t")

    def blank(like: Tensor) -> Gradient:
        return Gradient(
            lambda: torch.empty(like.shape, dtype=dtype, device=like.device), blank=True
        )

    if not call.spread or n == 1:
        ranges = comm.ranges("t", length) if call.spread else ((0, length),)
        return add(kv, ranges, 0, blank(kv))
    me = comm.axis_index("t")
    hops = _hops(call, length)
    if hops is not None:
        waits = [comm.ppermute_async(_parts(kv, parts), "t", d) for d, parts in hops]
        own = add(kv, comm.ranges("t", length), me * length, blank(kv))
        back = []
        for (d, parts), wait in zip(hops, waits, strict=True):
            j, piece = (me - d) % n, wait()
            ranges = comm.ranges("t", length, j)
            found = [
                add(part, where, start, blank(part))
                for part, where, start in _each(piece, ranges, parts, j * length)
            ]
            back.append((parts, comm.ppermute_async(torch.cat(found, -2), "t", -d)))
        for parts, wait in back:
            for (lo, hi), part in _split(wait(), parts):
                own[..., lo:hi, :] += part
        return own
    if call.transport == "gather":
        whole = comm.all_gather(kv, "t", -2)
        ranges = tuple(r for j in range(n) for r in comm.ranges("t", length, j))
        return comm.psum_scatter(add(whole, ranges, 0, blank(whole)), "t", -2)
    own, arriving = None, None  # of this rank's piece; of the one that this rank sees next
    for step in range(n):
        wait = comm.ppermute_async(kv, "t", 1) if step < n - 1 else None
        j = (me - step) % n
        grad = blank(kv) if arriving is None else Gradient(arriving, blank=False)
        made = add(kv, comm.ranges("t", length, j), j * length, grad)
        if step == 0:
            own = made
        else:
            arriving = comm.ppermute_async(made, "t", 1)
        kv = kv if wait is None else wait()
    assert own is not None
    assert arriving is not None
    return own.add_(arriving())


def _hops(call: _Call, length: int) -> list[tuple[int, list[tuple[int, int]]]] | None:
    """Return (shift, parts of a piece) that must travel under a window; None for everything.

    A rank sends the same parts whoever receives: those that any rank needs from that far.
    """
    if call.mask.window is None or not call.spread or not call.plain:
        return None
    comm, n = call.comm, call.comm.axis_size("t")
    held = [comm.ranges("t", length, j) for j in range(n)]
    hops = []
    for d in range(1, n):
        needed = union(
            [p for j in range(n) for p in visible(held[(j + d) % n], held[j], call.mask)]
        )
        if needed:
            hops.append((d, needed))
    whole = (n - 1) * length
    return hops if sum(hi - lo for _, parts in hops for lo, hi in parts) < whole else None


def _parts(kv: Tensor, parts: list[tuple[int, int]]) -> Tensor:
    return torch.cat([kv[..., lo:hi, :] for lo, hi in parts], -2)


def _split(x: Tensor, parts: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Tensor]]:
    at = 0
    for lo, hi in parts:
        yield (lo, hi), x[..., at : at + hi - lo, :]
        at += hi - lo


def _each(
    piece: Tensor, ranges: Ranges, parts: list[tuple[int, int]], start: int
) -> Iterator[tuple[Tensor, Ranges, int]]:
    """Yield the parts of a piece that arrived, each as sources of its own."""
    for (lo, hi), part in _split(piece, parts):
        yield part, take(ranges, [(lo, hi)]), start + lo


# -- shapes -----------------------------------------------------------------------------------


_Four = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _four(ints: Sequence[Tensor | None]) -> _Four:
    positions, source_positions, segments, source_segments = ints
    return positions, source_positions, segments, source_segments


def _heads_first(q: Tensor) -> Tensor:
    return einsum("b t h k -> b h t k", q.flatten(2, 3))


def _heads_last(x: Tensor, heads: torch.Size) -> Tensor:
    return einsum("b h t k -> b t h k", x).unflatten(2, heads)


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """Return k and v as one message: [2, b, g, s, k], or [b, g, s, k + w] of unequal widths."""
    ks, vs = einsum("b s g k -> b g s k", k), einsum("b s g k -> b g s k", v)
    return torch.stack([ks, vs]) if k.shape[-1] == v.shape[-1] else torch.cat([ks, vs], -1)


def _unpacked(kv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if k.shape[-1] == v.shape[-1]:
        return kv[0], kv[1]
    return kv[..., : k.shape[-1]], kv[..., k.shape[-1] :]


def _kernel(call: _Call, q: Tensor, v: Tensor, seen: Tensor | None) -> TileKernel:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    return choose_tile_kernel(
        q.device.type,
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        masked=seen is not None,
        kernel=call.kernel,
        capability=capability,
    ).name


def _only_shapes(x: Tensor) -> bool:
    """Whether a trace asks for shapes and messages alone."""
    return x.device.type == "meta"


def _is_fake(x: Tensor) -> bool:
    return type(x) is not Tensor
