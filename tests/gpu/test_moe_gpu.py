"""On one GPU: experts by grouped products and kernels, against a loop in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.experts import expert_rows
from tests.functional.check import rand
from tests.tolerances import distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # Dynamo's own: it reads .grad of what it wraps, say
]

EMBED, FFN, EXPERTS, K, TOKENS = 64, 96, 4, 2, 48
LIMIT = 2e-2
COUNTS = {
    "uneven": (30, 17, 41, 8),
    "one has none": (30, 0, 58, 8),
    "one has all": (0, 0, 96, 0),
}
modes = pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])


def compiled(fn: Callable[..., Tensor], compiles: bool) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(fn, dynamic=False) if compiles else fn


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return numbers that bfloat16 has exactly."""
    return [rand(*shape, seed=i).bfloat16() / 2 for i, shape in enumerate(shapes)]


def assert_like_float64(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: Sequence[Tensor]
) -> None:
    """Compare results and all gradients: ours on the GPU, theirs in float64 on the CPU."""
    exact = [x.double().requires_grad_() for x in leaves]
    mine = [x.cuda().requires_grad_() for x in leaves]
    expected, found = theirs(*exact), ours(*mine)
    grad = rand(*expected.shape, seed=9).bfloat16()
    slopes = torch.autograd.grad(expected, exact, grad.double())
    mine_slopes = torch.autograd.grad(found, mine, grad.cuda())
    assert distance(found.detach().cpu(), expected.detach()) < LIMIT
    for i, (got, want) in enumerate(zip(mine_slopes, slopes, strict=True)):
        assert distance(got.cpu(), want) < LIMIT, f"gradient {i}"


@modes
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_products_are_a_product_per_expert(counts: tuple[int, ...], compiles: bool) -> None:
    """Counts on the device; weights of experts without rows have the gradient 0."""
    n = sum(counts)
    weight = (EXPERTS, FFN, EMBED)
    rows, gates, *weights = drawn((n, EMBED), (n, 1), weight, weight, weight)
    on_device = torch.tensor(counts, device="cuda")

    def ours(rows: Tensor, gates: Tensor, *ws: Tensor) -> Tensor:
        return expert_rows(rows, gates, on_device, ws, F.swiglu, products="grouped")

    def theirs(rows: Tensor, gates: Tensor, *ws: Tensor) -> Tensor:
        return expert_rows(rows, gates, counts, ws, F.swiglu, products="loop")

    assert_like_float64(compiled(ours, compiles), theirs, [rows, gates, *weights])


@modes
@pytest.mark.parametrize("capacity", [None, TOKENS // 2])
@pytest.mark.parametrize("gated", [True, False])
def test_dispatch_and_experts(gated: bool, capacity: int | None, compiles: bool) -> None:
    """With choices that were dropped: their rows lie behind all others, and nobody reads them."""
    weight = (EXPERTS, FFN, EMBED)
    weights = [weight] * (3 if gated else 2)
    leaves = drawn((2, TOKENS // 2, EMBED), (2, TOKENS // 2, K), *weights)
    draw = torch.Generator().manual_seed(0)
    choice = torch.rand(TOKENS, EXPERTS, generator=draw).argsort(1)[:, :K]
    choice[::5, 0] = EXPERTS  # no expert
    choice = choice.view(2, TOKENS // 2, K)
    on_device = choice.cuda()
    activation = F.swiglu if gated else F.squared_relu

    def ours(x: Tensor, gates: Tensor, *ws: Tensor) -> Tensor:
        return F.experts(x, gates, on_device, ws, capacity=capacity, activation=activation)

    def theirs(x: Tensor, gates: Tensor, *ws: Tensor) -> Tensor:
        return F.experts(x, gates, choice, ws, activation=activation)

    assert_like_float64(compiled(ours, compiles), theirs, leaves)


def test_the_host_waits_for_nothing_and_bits_repeat() -> None:
    """Routing, dispatch, experts and all gradients without one synchronisation."""
    weight = (EXPERTS, FFN, EMBED)
    x, router, *ws = (
        t.cuda().requires_grad_()
        for t in drawn((1, TOKENS, EMBED), (EXPERTS, EMBED), weight, weight, weight)
    )

    def run() -> list[Tensor]:
        gates, choice = F.route(F.linear(x, router), k=K)
        y = F.experts(x, gates, choice, ws)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, router, *ws])]

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
