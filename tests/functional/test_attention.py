"""Attention kernels against a loop over queries, and each other."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.attention_kernels import (
    TileKernel,
    choose_tile_kernel,
    tile_backward,
    tile_forward,
)
from tests.functional.check import assert_same, rand
from tests.functional.halves import local_form, on_halves
from tests.functional.tile_table import BOUNDS, distances
from tests.tolerances import RELATIVE, distance

KERNELS = ["reference", "sdpa", "auto"]
HEADS = {"mha": (4, 1), "gqa": (2, 3), "mqa": (1, 4)}
PERMUTED = torch.tensor([3, 0, 5, 1, 4, 2])
BATCHED = torch.stack([PERMUTED, torch.tensor([0, 1, 2, 0, 1, 2])])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 4], [2, 3, 3, 3, 3, 3]])
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 2},
    "both sides": {"causal": False, "window": 2},
    "scale": {"scale": 0.7},
    "permuted": {"positions": PERMUTED},
    "permuted window": {"positions": PERMUTED, "window": 3},
    "batched": {"positions": BATCHED},
    "full batched": {"positions": BATCHED, "causal": False},
    "documents": {"segment_ids": DOCUMENTS},
    "documents, one row": {"segment_ids": DOCUMENTS[0], "window": 2},
    "documents, full": {"segment_ids": DOCUMENTS, "causal": False},
    "documents, permuted": {"segment_ids": DOCUMENTS[0][PERMUTED], "positions": PERMUTED},
}


def operands(
    kv_heads: int, group: int, dtype: torch.dtype, t: int = 6, s: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rand(2, t, kv_heads, group, 8, dtype=dtype),
        rand(2, s, kv_heads, 8, dtype=dtype, seed=1),
        rand(2, s, kv_heads, 8, dtype=dtype, seed=2),
    )


def by_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    positions: Tensor | None = None,
    source_positions: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with one query at a time, over the sources it sees."""
    at = torch.arange(q.shape[1]) if positions is None else positions
    at = at.expand(q.shape[0], -1)
    there = at if source_positions is None else source_positions.expand(q.shape[0], -1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    document = torch.zeros(1, dtype=torch.int64) if segment_ids is None else segment_ids
    document = document.expand(q.shape[0], k.shape[1])

    def one(b: int, t: int, g: int, r: int) -> Tensor:
        distance = (at[b, t] - there[b]).tolist()
        near = [abs(d) < (window or 10**9) and (d >= 0 or not causal) for d in distance]
        if segment_ids is not None:
            near = [a and x == document[b, t] for a, x in zip(near, document[b], strict=True)]
        seen = torch.tensor(near).nonzero()[:, 0]
        if len(seen) == 0:
            return v[b, 0, g] * 0
        weights = torch.exp(scale * (k[b, seen, g] @ q[b, t, g, r]))
        rest = 0 if sinks is None else torch.exp(sinks[g, r])
        return (weights / (weights.sum() + rest)) @ v[b, seen, g]

    dims = [range(n) for n in q.shape[:4]]
    rows = [one(b, t, g, r) for b in dims[0] for t in dims[1] for g in dims[2] for r in dims[3]]
    return torch.stack(rows).unflatten(0, q.shape[:4])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS)
def test_reference_equals_a_loop_over_queries(heads: str, mask: str) -> None:
    assert_same(
        lambda *xs: F.attention(*xs, **MASKS[mask], kernel="reference"),
        lambda *xs: by_query(*xs, **MASKS[mask]),
        *operands(*HEADS[heads], torch.float64),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", ["sdpa", "auto"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS)
def test_kernels_equal_the_reference(
    heads: str, mask: str, kernel: str, dtype: torch.dtype
) -> None:
    """Values and all gradients: a group folded wrongly shows in those of k and v."""
    assert_same(
        lambda *xs: F.attention(*xs, **MASKS[mask], kernel=kernel),
        lambda *xs: F.attention(*xs, **MASKS[mask], kernel="reference"),
        *operands(*HEADS[heads], dtype),
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_permuted_sequence_gives_the_permuted_result(kernel: str) -> None:
    """A mask by index would let a query see what comes after it."""
    q, k, v = operands(2, 3, torch.float64)
    straight = F.attention(q, k, v, kernel=kernel)
    shuffled = F.attention(
        q[:, PERMUTED], k[:, PERMUTED], v[:, PERMUTED], positions=PERMUTED, kernel=kernel
    )
    assert distance(shuffled, straight[:, PERMUTED]) < RELATIVE[torch.float64]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_last_query_alone_equals_the_last_row(kernel: str) -> None:
    """Generation with a cache: one query, sources at positions of their own."""
    q, k, v = operands(2, 3, torch.float64)
    here = torch.arange(6)
    last = F.attention(q[:, -1:], k, v, positions=here[-1:], source_positions=here, kernel=kernel)
    assert distance(last, F.attention(q, k, v, kernel=kernel)[:, -1:]) < RELATIVE[torch.float64]


@pytest.mark.parametrize("kernel", KERNELS)
def test_sources_without_a_mask_may_differ_in_number(kernel: str) -> None:
    assert_same(
        lambda *xs: F.attention(*xs, causal=False, kernel=kernel),
        lambda *xs: by_query(*xs, causal=False, source_positions=torch.arange(4)),
        *operands(2, 3, torch.float64, s=4),
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(kernel: str) -> None:
    at, there = torch.tensor([0, 5]), torch.tensor([3, 4])
    assert_same(
        lambda *xs: F.attention(*xs, positions=at, source_positions=there, kernel=kernel),
        lambda *xs: by_query(*xs, positions=at, source_positions=there),
        *operands(2, 3, torch.float64, t=2, s=2),
    )
    q, k, v = operands(2, 3, torch.float64, t=2, s=2)
    out = F.attention(q, k, v, positions=at, source_positions=there, kernel=kernel)
    assert out[:, 0].count_nonzero() == 0


def test_reference_computes_half_precision_in_float32() -> None:
    q, k, v = (x.to(torch.bfloat16) for x in operands(2, 3, torch.float64))
    got = F.attention(q, k, v, kernel="reference")
    expected = F.attention(q.double(), k.double(), v.double(), kernel="reference")
    assert got.dtype == torch.bfloat16
    assert distance(got, expected) < RELATIVE[torch.bfloat16] / 4


SINKS = rand(2, 3, seed=9)


@pytest.mark.parametrize("mask", ["causal", "window", "batched", "documents"])
@pytest.mark.parametrize("kernel", ["reference", "sdpa", "auto", "cpu_flash"])
def test_sinks_join_the_softmax_and_bring_no_value(kernel: str, mask: str) -> None:
    """Their own gradient too: a sink without one never learns."""
    assert_same(
        lambda q, k, v, s: F.attention(q, k, v, sinks=s, **MASKS[mask], kernel=kernel),
        lambda q, k, v, s: by_query(q, k, v, sinks=s, **MASKS[mask]),
        *operands(2, 3, torch.float64),
        SINKS,
    )


def test_documents_side_by_side_are_documents_alone() -> None:
    q, k, v = operands(2, 3, torch.float64)
    for kernel in ("reference", "auto", "cpu_flash"):
        packed = F.attention(q, k, v, segment_ids=DOCUMENTS[0], kernel=kernel)
        for a, b in ((0, 3), (3, 5), (5, 6)):
            alone = F.attention(q[:, a:b], k[:, a:b], v[:, a:b])
            assert distance(packed[:, a:b], alone) < RELATIVE[torch.float64]


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("cpu_flash", torch.bfloat16),
        ("cpu_flash", torch.float16),
        ("cpu_flash", torch.float32),
        ("plain", torch.bfloat16),
    ],
)
def test_tiles_and_rings_of_them_are_as_near_to_float64_as_their_dtype(
    kernel: TileKernel, dtype: torch.dtype, packed: bool, num_ranks: int
) -> None:
    """The stated table of the fused kernels; those of a GPU are in tests/gpu."""
    found = distances(kernel, dtype, "cpu", num_ranks, packed=packed)
    assert max(found.values()) < BOUNDS[dtype], found
    assert max(found.values()) > BOUNDS[dtype] / 20  # or float64 is compared with itself


def test_the_package_flash_attn_is_called_with_tokens_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its functions of version 2.7, played by plain torch: layouts, order and scale."""

    def heads_first(*xs: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2) for x in xs]

    def forward(q, k, v, *, softmax_scale, causal, return_softmax, **rest):
        q, k, v = heads_first(q, k, v)
        out, lse = tile_forward("plain", q, k, v, None, causal=causal, scale=softmax_scale)
        return out.transpose(1, 2), lse, None, None

    def backward(dout, q, k, v, out, lse, dq, dk, dv, *, softmax_scale, causal, **rest):
        g, q, k, v, merged = heads_first(dout, q, k, v, out)
        found = tile_backward(
            "plain", g, q, k, v, merged, lse, None, causal=causal, scale=softmax_scale
        )
        for into, x in zip((dq, dk, dv), found, strict=True):
            into.copy_(x.transpose(1, 2))

    assert choose_tile_kernel("cuda", torch.bfloat16, 64, 64, masked=False).name == "cudnn"
    interface = ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward, interface._flash_attn_backward = forward, backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    q, k, v, g = (rand(2, 3 if i else 6, 5, 8, seed=i) for i in range(4))
    g = rand(2, 6, 5, 8, seed=3)
    for causal in (True, False):
        results = []
        for kernel in ("flash_attn", "plain"):
            options = {"causal": causal, "scale": 0.4}
            out, lse = tile_forward(kernel, q, k, v, None, **options)
            grads = tile_backward(kernel, g, q, k, v, out, lse, None, **options)
            results.append([out, lse, *grads])
        for a, b in zip(*results, strict=True):
            assert distance(a, b) < RELATIVE[torch.float64]
    monkeypatch.setattr("megatree.functional.flash_attn_package.installed", lambda: True)
    old = {"masked": False, "capability": (8, 0)}
    assert choose_tile_kernel("cuda", torch.bfloat16, 64, 64, **old).name == "flash_attn"


def test_a_tile_kernel_that_cannot_is_refused_by_name() -> None:
    half = [x.to(torch.bfloat16) for x in operands(2, 3, torch.float64)]
    for kernel, error in (
        ("flash", r"kernel 'flash' runs on cuda, not on cpu\. Use kernel='auto'"),
        ("cpu_flash", r"kernel 'cpu_flash' has no dropout by key, the rate is 0\.1"),
    ):
        options = {"dropout": 0.1, "key": KEY} if kernel == "cpu_flash" else {}
        with pytest.raises(ValueError, match=error):
            F.attention(*half, kernel=kernel, **options)
    chosen = choose_tile_kernel("cuda", torch.bfloat16, 100, 100, masked=False)
    assert chosen.name == "plain"
    assert "flash needs a head_dim divisible by 8, at most 256, not 100" in chosen.why


KEY = torch.tensor(5)


def dropped(q: Tensor, k: Tensor, v: Tensor, rate: float, key: Tensor | int = KEY) -> Tensor:
    return F.attention(q, k, v, dropout=rate, key=key)


def test_dropout_of_weights_is_unbiased() -> None:
    """The mean over 500 keys is the result without dropout, within five standard errors."""
    q, k, v = operands(2, 2, torch.float64)
    samples = torch.stack([dropped(q, k, v, 0.3, key) for key in range(500)])
    error = samples.mean(0) - F.attention(q, k, v)
    assert (error.abs() <= 5 * samples.std(0) / math.sqrt(500) + 1e-12).all()
    assert samples.std(0).min() > 0


@pytest.mark.parametrize(("label", "dim"), [("b", 0), ("g", 2), ("r", 3)])
def test_halves_drop_what_the_whole_drops(label: str, dim: int) -> None:
    q, k, v = operands(2, 2, torch.float64)
    whole = dropped(q, k, v, 0.4)
    results, _ = on_halves(
        label,
        lambda comm: local_form(F.attention)(
            comm,
            q.chunk(2, dim)[comm.rank],
            *(x if label == "r" else x.chunk(2, dim)[comm.rank] for x in (k, v)),
            key=KEY,
            dropout=0.4,
        ),
    )
    assert distance(torch.cat(results, dim), whole) < RELATIVE[torch.float64]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"kernel": "sdpa", "dropout": 0.1, "key": KEY},
        r"'sdpa' has no dropout by key, the rate is 0\.1",
    ),
    ({"dropout": 0.1}, r"attention: dropout of rate 0\.1 has no key\. Give key="),
    ({"dropout": 1.0, "key": KEY}, r"attention: dropout rate is 1\.0\. Give a rate in"),
    ({"kernel": "fast"}, r"no kernel 'fast'\. Kernels are auto, reference, sdpa"),
    ({"window": 0}, r"attention: window is 0 tokens\. Give at least 1, or None"),
    ({"window": 7}, r"attention: window is 7 tokens, axis 'seq' has 6\. Give at most 6, or None"),
    (
        {"segment_ids": torch.tensor([0, 1, 1, 0, 2, 2])},
        r"attention: segment ids fall from 1 to 0 at token 3 of axis 'seq'\. Number the documents",
    ),
    ({"source_segment_ids": DOCUMENTS}, "source_segment_ids without segment_ids"),
    ({"source_positions": torch.arange(6)}, "source_positions without positions"),
]


@pytest.mark.parametrize(("options", "error"), REFUSALS)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], error: str) -> None:
    # Where beartype checks annotations, it comes first for an unknown kernel.
    with pytest.raises((ValueError, TypeError), match=f"{error}|Type-check error"):
        F.attention(*operands(2, 3, torch.float64), **options)


def test_a_mask_over_sources_without_positions_is_refused() -> None:
    """torch would align the first query with the first source, silently."""
    with pytest.raises(
        ValueError, match=r"6 queries and 4 sources, and a mask\. Give positions and"
    ):
        F.attention(*operands(2, 3, torch.float64, s=4))
