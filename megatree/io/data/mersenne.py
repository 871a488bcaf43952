"""The 64-bit Mersenne Twister, and the shuffle that Megatron's index builder makes with it."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, UInt64

from megatree.io.data import loops

_N, _M = 312, 156
_MATRIX = np.uint64(0xB5026F5AA96619E9)
_UPPER = np.uint64(0xFFFFFFFF80000000)
_LOWER = np.uint64(0x7FFFFFFF)


def draws64(seed: int) -> Iterator[UInt64[np.ndarray, " 312"]]:
    """Yield the numbers of the generator without end, 312 at a time.

    Reference: Nishimura 2000, "Tables of 64-bit Mersenne Twisters"; C++ calls it mt19937_64.

    >>> int(next(draws64(5489))[0])
    14514284786278117030
    """
    x = np.array(_seeded(seed), np.uint64)
    while True:
        _twist(x)
        yield _temper(x)


def shuffled(count: int, seed: int) -> Int64[np.ndarray, " count"]:
    """Return 0 to count - 1 after a Fisher-Yates shuffle from the end, modulo drawn."""
    if count >= loops.WORTH_COMPILING and (fast := loops.compiled(loops.shuffle64)):
        out = np.arange(count)
        fast(out, np.array(_seeded(seed), np.uint64))
        return out
    order = list(range(count))
    blocks = draws64(seed)
    for start in range(count - 1, 0, -_N):
        last = np.arange(start, max(start - _N, 0), -1)
        partner = next(blocks)[: len(last)] % (last + 1).astype(np.uint64)
        for i, j in zip(last.tolist(), partner.tolist(), strict=True):
            order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)


def _seeded(seed: int) -> list[int]:
    state = [seed % (1 << 64)]
    for i in range(1, _N):
        last = state[-1]
        state.append((6364136223846793005 * (last ^ (last >> 62)) + i) % (1 << 64))
    return state


def _twist(x: np.ndarray) -> None:
    def mixed(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        y = (high & _UPPER) | (low & _LOWER)
        return (y >> np.uint64(1)) ^ np.where(y & np.uint64(1), _MATRIX, np.uint64(0))

    x[: _N - _M] = x[_M:] ^ mixed(x[: _N - _M], x[1 : _N - _M + 1])
    x[_N - _M : -1] = x[: _M - 1] ^ mixed(x[_N - _M : -1], x[_N - _M + 1 :])
    x[-1:] = x[_M - 1 : _M] ^ mixed(x[-1:], x[:1])


def _temper(x: np.ndarray) -> np.ndarray:
    x = x ^ ((x >> np.uint64(29)) & np.uint64(0x5555555555555555))
    x = x ^ ((x << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000))
    x = x ^ ((x << np.uint64(37)) & np.uint64(0xFFF7EEE000000000))
    return x ^ (x >> np.uint64(43))
