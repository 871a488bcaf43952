"""On one GPU: products add bfloat16 gradients to float32 sums themselves, eager and compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from megatree.functional.product_sums import add_matrix_product
from tests.functional.check import rand
from tests.runtime.test_added_by_products import (
    MODELS,
    exact_sums,
    gradients,
    is_added,
    one_product_sums,
    rounded,
)
from tests.tolerances import distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch says so whenever the mode is set, as it knows of some calls that it cannot see.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    # Under torch 2.11 dynamo itself reads .grad of what it wraps.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

Transform = Callable[[Callable[..., Any]], Callable[..., Any]]
TRANSFORMS: dict[str, Transform] = {
    "eager": lambda fn: fn,
    "compiled": partial(torch.compile, dynamic=False),
}
FLOAT32 = 1e-5
"""Sums of some hundred exact products of bfloat16 numbers, in any order."""


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_sums_of_exact_factors_are_those_of_float64(transform: str) -> None:
    """Two microbatches of a product of bfloat16 numbers; before, both gradients were rounded."""
    step = partial(one_product_sums, num_microbatches=2)
    expected = step(torch.float64)
    after = step(torch.bfloat16, "cuda", TRANSFORMS[transform]).cpu()
    with rounded():
        before = step(torch.bfloat16, "cuda", TRANSFORMS[transform]).cpu()
    print(f"{transform}: {distance(before, expected):.1e} -> {distance(after, expected):.1e}")  # noqa: T201
    assert distance(after, expected) < FLOAT32
    assert distance(before, expected) > 50 * distance(after, expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_product_adds_what_its_factors_make(model: str, transform: str) -> None:
    """Against float64 products of the very factors, and as near to the model in float64 as bfloat16
    activations allow.
    """
    cfg = MODELS[model]
    on_card = partial(gradients, cfg, device="cuda", num_microbatches=2)
    wide = gradients(cfg, torch.float64, num_microbatches=2)
    with exact_sums() as exact:
        got = on_card(torch.bfloat16, transform=TRANSFORMS[transform])
    assert {path for path, _ in exact} == {name for name in wide if is_added(model, name)}
    for name in wide:
        if is_added(model, name):
            layers = sorted(i for path, i in exact if path == name and i is not None)
            best = torch.stack([exact[name, i] for i in layers]) if layers else exact[name, None]
            assert distance(got[name], best) < FLOAT32, name
            # Tiny layers: few sums to average over 2^-9 of every activation and cotangent.
            assert distance(got[name].cpu(), wide[name]) < 6e-2, name


@pytest.mark.parametrize("many", [None, 4])
def test_a_product_adds_in_place(many: int | None) -> None:
    """The first replaces what was there, the next is added; one matrix, or parts of a row."""
    shape = (48, 40) if many is None else (many, 48, 40)
    row = torch.full((*shape[:-2], 2, *shape[-2:]), torch.nan, device="cuda")
    target = row[..., 1, :, :]
    expected = torch.zeros(shape, dtype=torch.float64, device="cuda")
    for number in range(2):
        left = rand(*shape[:-2], 96, 48, seed=number).bfloat16().cuda()
        right = rand(96, 40, seed=9 + number).bfloat16().cuda()
        add_matrix_product(target, left, right, fresh=number == 0)
        expected += left.double().mT @ right.double()
    assert distance(target, expected) < FLOAT32
    assert row[..., 0, :, :].isnan().all()


def test_nothing_waits_and_nothing_narrow_is_made() -> None:
    """No weight-sized bfloat16 tensor, and no wait for the device."""
    left, right = (torch.randn(64, n, device="cuda").bfloat16() for n in (512, 256))
    target = torch.zeros(512, 256, device="cuda")
    add_matrix_product(target, left, right, fresh=False)  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_matrix_product(target, left, right, fresh=False)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.cuda.max_memory_allocated() == before
