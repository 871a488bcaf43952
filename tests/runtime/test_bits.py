"""The hash sees every single bit, and where an element is."""

import pytest
import torch

from megatree.runtime.bits import hash_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_element_counts(dtype: torch.dtype) -> None:
    x = torch.arange(5).to(dtype)
    ints = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    before, seen = hash_bits(x).item(), set()
    for at in range(5):
        for bit in range(8 * x.element_size()):
            ints[at] ^= torch.tensor(1, dtype=ints.dtype) << bit
            seen.add(hash_bits(x).item())
            ints[at] ^= torch.tensor(1, dtype=ints.dtype) << bit
    assert before not in seen
    assert len(seen) == 5 * 8 * x.element_size()
    assert hash_bits(x).item() == before


def test_places_count_in_every_block() -> None:
    """More than one row and more than one stretch of rows."""
    size = (1 << 22) + (1 << 14) + 3
    x = torch.zeros(size)
    seen = {hash_bits(x).item()}
    for at in (0, 1, 1 << 14, (1 << 22) - 1, 1 << 22, (1 << 22) + (1 << 14), size - 1):
        x[at] = 1.0
        seen.add(hash_bits(x).item())
        x[at] = 0.0
    assert len(seen) == 8


def test_signs_of_zero_and_bits_of_nan_count() -> None:
    assert hash_bits(torch.tensor([0.0])) != hash_bits(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert hash_bits(nan) == hash_bits(nan.clone())
    assert hash_bits(nan) != hash_bits(-nan)


def test_layout_in_memory_does_not_count() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert hash_bits(x.t().contiguous().t()) == hash_bits(x)
    assert hash_bits(torch.empty(0)) == 0


def test_another_seed_is_another_hash() -> None:
    x = torch.arange(6.0)
    assert hash_bits(x, 1) != hash_bits(x)
