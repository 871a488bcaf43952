"""Attention kernels on one GPU, against float64: one tile, rings of tiles, packed documents."""

import pytest
import torch

import megatree.functional as F
from megatree.functional.attention_kernels import TileKernel, choose_tile_kernel
from megatree.functional.documents import segment_ids_of
from tests.functional.tile_table import BOUNDS, distances, operands
from tests.tolerances import distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

TABLE: list[tuple[TileKernel, torch.dtype, bool]] = [
    ("flash", torch.bfloat16, False),
    ("flash", torch.float16, False),
    ("cudnn", torch.bfloat16, False),
    ("cudnn", torch.float16, False),
    ("efficient", torch.bfloat16, False),
    ("efficient", torch.bfloat16, True),
    ("efficient", torch.float32, False),
    ("efficient", torch.float32, True),
]


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize(("kernel", "dtype", "packed"), TABLE)
def test_rings_of_fused_tiles_are_as_near_to_float64_as_their_dtype(
    kernel: TileKernel, dtype: torch.dtype, packed: bool, num_ranks: int
) -> None:
    found = distances(kernel, dtype, "cuda", num_ranks, packed=packed)
    assert max(found.values()) < BOUNDS[dtype], found


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_varlen_equals_the_reference(causal: bool, window: int | None, packed: bool) -> None:
    """Documents and windows that a fused kernel ignored would be off by more than a rounding."""
    q, k, v, g = operands(torch.bfloat16, "cuda")
    ids = torch.stack([segment_ids_of(torch.tensor(s), 256) for s in ([0, 7, 100, 256], [0, 90])])
    segments = ids.cuda() if packed else None
    results = []
    for kernel, dtype in (("auto", torch.bfloat16), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = F.attention(
            *leaves, segment_ids=segments, causal=causal, window=window, kernel=kernel
        )
        out.backward(g.to(dtype))
        results.append([out.detach(), *(x.grad for x in leaves)])
    for got, expected in zip(*results, strict=True):
        assert distance(got, expected) < BOUNDS[torch.bfloat16]


def test_the_choice_on_this_card() -> None:
    assert choose_tile_kernel("cuda", torch.bfloat16, 64, 64, masked=False).name == "cudnn"
    old = choose_tile_kernel("cuda", torch.bfloat16, 64, 64, masked=False, capability=(8, 0))
    assert old.name == "flash"
    assert choose_tile_kernel("cuda", torch.bfloat16, 64, 64, masked=True).name == "efficient"
    assert choose_tile_kernel("cuda", torch.float64, 64, 64, masked=False).name == "plain"
