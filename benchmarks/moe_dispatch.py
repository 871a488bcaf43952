"""What it costs to route tokens and bring them to experts and back: linear in their number?"""

import argparse
import ctypes
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.router import capacity_of

LIMIT = 1.10
"""Largest exponent of time over tokens; n log n of a sort between 2^12 and 2^16 is 1.10."""

SEQ, EMBED, EXPERTS, TOP_K = 1024, 16, 64, 6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time of one number of tokens.

    Args:
        tokens: that are routed.
        ms: CPU time of routing, dispatch and combine, forward and backward: the least of the runs.
    """

    tokens: int
    ms: float


def measure(
    sizes: Sequence[int], *, capacity_factor: float | None = None, runs: int = 5
) -> list[Cost]:
    """Time a 64-expert top-6 mixture whose experts are one element wide: all but the products.

    Args:
        sizes: numbers of tokens, multiples of 1024 (sequences).
        capacity_factor: None drops nothing; else rows are padded to the capacity of sequences.
        runs: of each size, after one that does not count.
    """
    calls = {tokens: _call(tokens, capacity_factor) for tokens in sizes}
    times: dict[int, list[float]] = {tokens: [] for tokens in sizes}
    for run in range(-1, runs):
        for tokens, call in calls.items():  # in turns: a busy moment hits all sizes alike
            start = time.process_time()
            call()
            if run >= 0:
                times[tokens].append(time.process_time() - start)
    return [Cost(tokens=tokens, ms=min(found) * 1e3) for tokens, found in times.items()]


def exponent(costs: Sequence[Cost]) -> float:
    """Return b of the least-squares fit ms = a * tokens^b."""
    x = [math.log(cost.tokens) for cost in costs]
    y = [math.log(cost.ms) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def _call(tokens: int, capacity_factor: float | None) -> Callable[[], None]:
    draw = torch.Generator().manual_seed(tokens)
    batch = tokens // SEQ
    x = torch.randn(batch, SEQ, EMBED, generator=draw).requires_grad_()
    logits = torch.randn(batch, SEQ, EXPERTS, generator=draw).requires_grad_()
    weights = [torch.randn(EXPERTS, 1, EMBED, generator=draw) for _ in range(3)]
    leaves: list[Tensor] = [x, logits]

    def call() -> None:
        gates, choice = F.route(logits, k=TOP_K)
        capacity = None
        if capacity_factor is not None:
            capacity = capacity_of(SEQ, TOP_K, EXPERTS, capacity_factor)
            choice = F.drop_over_capacity(gates, choice, num_experts=EXPERTS, capacity=capacity)
        y = F.experts(x, gates, choice, weights, capacity=capacity)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return call


def keep_memory() -> None:
    """Tell glibc to give no memory back: else a tensor that outgrows its thresholds is paged in at
    every use, which doubled the time of a token from 16,384 tokens on.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            no_mmap, trim = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
            libc.mallopt(no_mmap, 0)
            libc.mallopt(trim, 2**31 - 1)


def report(sizes: Sequence[int], *, runs: int = 5) -> float:
    """Print times and exponents of both ways; return the larger exponent."""
    worst = 0.0
    for name, factor in (("dropless", None), ("padded to 1.25 x the mean", 1.25)):
        costs = measure(sizes, capacity_factor=factor, runs=runs)
        found = exponent(costs)
        worst = max(worst, found)
        print(f"dispatch, {name}: {EXPERTS} experts, top {TOP_K}, embed {EMBED}, CPU time")
        for cost in costs:
            each = cost.ms * 1e6 / cost.tokens
            print(f"  {cost.tokens:>8,} tokens  {cost.ms:>10.2f} ms  {each:>8.0f} ns a token")
        print(f"  time ~ tokens^{found:.3f} (at most {LIMIT})")
        told = {"benchmark": "moe_dispatch", "what": name, "exponent": round(found, 4)}
        print(json.dumps({**told, "ms": {cost.tokens: round(cost.ms, 3) for cost in costs}}))
    return worst


def main() -> None:
    """Measure, and fail where the time grows faster than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1 << n for n in range(12, 17)])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    worst = report(args.sizes, runs=args.runs)
    assert worst <= LIMIT, f"time grows as tokens^{worst:.3f}"


if __name__ == "__main__":
    main()
