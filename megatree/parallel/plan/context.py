"""Bytes and seconds of attention over a cut sequence, per lowering, and which one to take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatree.functional.attention_tiles import Mask, union, visible
from megatree.parallel.context import AllGather, Ring, Ulysses
from megatree.parallel.order import causal_work, natural_ranges
from megatree.parallel.plan.device import H100_SXM, Device


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention of one layer on one rank, before its sequence is cut.

    Args:
        batch: sequences on a rank.
        seq: tokens of a whole sequence.
        kv_heads, group: key heads on a rank, and query heads of each.
        head_dim: width of a key and of a value.
        itemsize: bytes of an element of q, k and v.
        causal, window: the mask.
    """

    batch: int
    seq: int
    kv_heads: int
    group: int
    head_dim: int
    itemsize: int = 2
    causal: bool = True
    window: int | None = None

    def kv_bytes(self, tokens: int, itemsize: int | None = None) -> int:
        """Return the bytes of keys and values of some tokens, with as many heads as they have."""
        width = 2 * self.kv_heads * self.head_dim
        return self.batch * tokens * width * (itemsize or self.itemsize)

    def q_bytes(self, tokens: int) -> int:
        """Return the bytes of queries (or of the result) of some tokens."""
        return self.batch * tokens * self.kv_heads * self.group * self.head_dim * self.itemsize

    @property
    def flops(self) -> int:
        """FLOPs of the two products of a whole forward, hidden pairs left out."""
        if self.causal:
            pairs = causal_work(self.seq, 1, 1, window=self.window)[0]
        else:
            pairs = self.seq * min(self.seq, 2 * (self.window or self.seq) - 1)
        return 4 * self.batch * self.kv_heads * self.group * pairs * self.head_dim


def travelling_tokens(work: Attention, cp: int, *, zigzag: bool) -> int:
    """Return the tokens whose keys and values a rank receives: all others', or a window's."""
    local = work.seq // cp
    mask = Mask(causal=work.causal, window=work.window)
    if work.window is None:
        return (cp - 1) * local
    chunks = 2 * cp if zigzag else 1
    held = [natural_ranges(work.seq, chunks, j * local, (j + 1) * local) for j in range(cp)]
    halo = sum(
        hi - lo
        for d in range(1, cp)
        for lo, hi in union(
            [p for j in range(cp) for p in visible(held[(j + d) % cp], held[j], mask)]
        )
    )
    return min(halo, (cp - 1) * local)


def moved_bytes(
    work: Attention, cp: int, how: Any, *, zigzag: bool = False
) -> tuple[int, int] | None:
    """Return the bytes that a rank sends in forward and in backward; None where it cannot be.

    With n = seq / cp tokens on a rank, kv(n) the bytes of their keys and values, a(n) those of
    their gradients in float32 or better, q(n) those of their queries and of their results:

    | lowering | forward | backward |
    |---|---|---|
    | all-gather, ring | (cp - 1) kv(n) | (cp - 1) (kv(n) + a(n)) |
    | the same, with a window | kv(halo) | kv(halo) + a(halo) |
    | all-to-all over key heads | (cp - 1) / cp (2 q(n) + kv(n)) | the same |
    | all-to-all over the group | (cp - 1) / cp 2 q(n) + (cp - 1) kv(n) | the same |
    """
    tokens = travelling_tokens(work, cp, zigzag=zigzag)
    if isinstance(how, AllGather | Ring):
        kv, grads = work.kv_bytes(tokens), work.kv_bytes(tokens, max(4, work.itemsize))
        return kv, kv + grads
    n = work.seq // cp
    if work.kv_heads % cp == 0:
        once = (cp - 1) * (2 * work.q_bytes(n) + work.kv_bytes(n)) // cp
    elif work.group % cp == 0:
        once = (cp - 1) * 2 * work.q_bytes(n) // cp + (cp - 1) * work.kv_bytes(n)
    else:
        return None
    return once, once


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One lowering of one attention, forward and backward, on one rank.

    Args:
        how: the lowering.
        bytes: sent in forward and in backward.
        link_s: seconds on the link.
        exposed_s: seconds of them that compute does not hide.
        buffer_bytes: what is held at once beside the rank's own tensors.
        why_not: why it cannot be; "" if it can.
    """

    how: Any
    bytes: tuple[int, int] = (0, 0)
    link_s: float = 0.0
    exposed_s: float = 0.0
    buffer_bytes: int = 0
    why_not: str = ""

    def __str__(self) -> str:
        if self.why_not:
            return f"{self.how}: {self.why_not}"
        forward, backward = (x / 2**20 for x in self.bytes)
        return (
            f"{self.how}: sends {forward:,.1f} MiB forward and {backward:,.1f} MiB backward, "
            f"{1e3 * self.link_s:.3f} ms on the link, {1e3 * self.exposed_s:.3f} ms not hidden, "
            f"{self.buffer_bytes / 2**20:,.1f} MiB held"
        )


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Which lowering to take, and the numbers that say so.

    Args:
        choices: the best first.
        zigzag: whether zigzag order evens out a causal mask there.
        compute_s: seconds of one attention on one rank, forward and backward, evenly shared.
        bandwidth: of a rank's link, bytes/s.
    """

    choices: tuple[Choice, ...]
    zigzag: bool
    compute_s: float
    bandwidth: float

    @property
    def best(self) -> Any:
        """The lowering to take."""
        return self.choices[0].how

    def __str__(self) -> str:
        head = (
            f"attention: take {self.best}{' in zigzag order' if self.zigzag else ''} "
            f"({1e3 * self.compute_s:.3f} ms of compute a layer on a rank, "
            f"{self.bandwidth / 1e9:.0f} GB/s)"
        )
        return "\n".join([head, *(f"  {choice}" for choice in self.choices)])


def recommend(
    work: Attention,
    cp: int,
    *,
    bandwidth: float | None = None,
    device: Device = H100_SXM,
) -> Recommendation:
    """Recommend a lowering for one attention over `cp` ranks.

    A ring sends each piece under the work on the one before; an all-gather and an all-to-all are
    waited for. The backward does 2.5 times the products of the forward. The lowering with the
    fewest seconds that nothing hides comes first; between equals, the one that holds less.

    Args:
        work: the attention, of the heads and sequences on one rank.
        cp: ranks that share a sequence.
        bandwidth: of a rank's link among them, bytes/s; None takes the device's, within a node or
            between nodes by `cp`.
        device: rates and latency.

    Returns:
        A Recommendation: print it.

    Raises:
        ValueError: there is nothing to choose with one rank, or the sequence does not divide.
    """
    if cp < 2 or work.seq % cp:
        raise ValueError(
            f"recommend: {work.seq} tokens of axis 'seq' over cp={cp}. Give 2 ranks or more that "
            "divide the sequence."
        )
    fast = cp <= device.node_ranks
    link = bandwidth or (device.node_bandwidth if fast else device.network_bandwidth)
    forward = work.flops / cp / device.attention_rate
    compute = {"forward": forward, "backward": 2.5 * forward}
    zigzag = work.causal and work.window is None and work.seq % (2 * cp) == 0
    choices = [
        _choice(work, cp, how, link, device.latency, compute, zigzag)
        for how in (Ring(), AllGather(), Ulysses())
    ]
    choices.sort(key=lambda c: (bool(c.why_not), round(c.exposed_s, 9), c.buffer_bytes))
    return Recommendation(
        choices=tuple(choices),
        zigzag=zigzag and not isinstance(choices[0].how, Ulysses),
        compute_s=sum(compute.values()),
        bandwidth=link,
    )


def _choice(
    work: Attention,
    cp: int,
    how: Any,
    link: float,
    latency: float,
    compute: Mapping[str, float],
    zigzag: bool,
) -> Choice:
    moved = moved_bytes(work, cp, how, zigzag=zigzag)
    if moved is None:
        return Choice(
            how=how,
            why_not=f"neither {work.kv_heads} kv_heads nor a group of {work.group} divide by {cp}",
        )
    n = work.seq // cp
    tokens = travelling_tokens(work, cp, zigzag=zigzag)
    seconds = [size / link for size in moved]
    if isinstance(how, Ring):
        messages = cp - 1
        # Each of cp steps computes; all but the last send at the same time.
        exposed = sum(
            max(0.0, s + messages * latency - compute[phase] * messages / cp)
            for s, phase in zip(seconds, ("forward", "backward"), strict=True)
        )
        held = 2 * work.kv_bytes(min(n, tokens)) + 2 * work.kv_bytes(min(n, tokens), 4)
    elif isinstance(how, AllGather):
        exposed = sum(seconds) + 3 * latency
        held = work.kv_bytes(tokens) + work.kv_bytes(tokens, 4)
    else:
        exposed = sum(seconds) + 8 * latency
        held = 2 * work.q_bytes(n) + work.kv_bytes(n)
    return Choice(how=how, bytes=moved, link_s=sum(seconds), exposed_s=exposed, buffer_bytes=held)
