"""On one GPU: the Triton kernels and what they are a part of, against float64 on the CPU."""

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.activations import swiglu_halves
from megatree.parallel.siblings import linear_several
from megatree.runtime.optimizers.adamw_kernel import adamw_in_place
from tests.functional.check import rand
from tests.tolerances import distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # off on purpose
]

NARROW = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", NARROW)


def compiled(fn, compiles: bool):
    return torch.compile(fn, dynamic=False) if compiles else fn


@dtypes
@pytest.mark.parametrize("compiles", [False, True])
def test_swiglu_of_halves(dtype: torch.dtype, compiles: bool) -> None:
    x, grad = (3 * rand(37, 2 * 1056)).to(dtype), rand(37, 1056, seed=1).to(dtype)
    exact = x.double().requires_grad_()
    expected = swiglu_halves(exact)
    (slope,) = torch.autograd.grad(expected, exact, grad.double())
    mine = x.cuda().requires_grad_()
    found = compiled(swiglu_halves, compiles)(mine)
    (mine_slope,) = torch.autograd.grad(found, mine, grad.cuda())
    assert distance(found.detach().cpu(), expected.detach()) < NARROW[dtype]
    assert distance(mine_slope.cpu(), slope) < NARROW[dtype]


@dtypes
@pytest.mark.parametrize("chunk", [None, 128])
@pytest.mark.parametrize("compiles", [False, True])
def test_linear_cross_entropy(dtype: torch.dtype, chunk: int | None, compiles: bool) -> None:
    rows, width, classes = 300, 5003, 5000
    x, table = rand(rows, 64).to(dtype), (rand(width, 64, seed=1) / 4).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(0))
    labels[::7] = -100
    weights = rand(rows, seed=2).abs().float()

    def loss(x: Tensor, table: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, table, labels, weights, num_classes=classes, chunk=chunk)

    exact = [z.double().requires_grad_() for z in (x, table, weights)]
    expected = loss(exact[0], exact[1], labels, exact[2])
    slopes = torch.autograd.grad(0.5 * expected, exact)
    mine = [z.cuda().requires_grad_() for z in (x, table, weights)]
    found = compiled(loss, compiles)(mine[0], mine[1], labels.cuda(), mine[2])
    mine_slopes = torch.autograd.grad(0.5 * found, mine)
    assert distance(found.detach().cpu(), expected.detach()) < NARROW[dtype]
    for got, want in zip(mine_slopes, slopes, strict=True):
        assert distance(got.cpu(), want) < NARROW[dtype]


def test_adamw_rounds_its_copy_to_nearest_and_ignores_an_overflow() -> None:
    n = 5000
    p, g, v = rand(n).float().cuda(), rand(n, seed=1).bfloat16().cuda(), torch.zeros(n).cuda()
    m, copy, one = torch.zeros(n).cuda(), torch.zeros(n).bfloat16().cuda(), torch.ones(()).cuda()
    theirs = p.double().cpu().requires_grad_()
    theirs.grad = g.double().cpu()
    torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1).step()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "count": 1}
    adamw_in_place(p, g, m, v, copy=copy, scale=one, found_inf=0 * one, **options)
    assert distance(p.cpu(), theirs.detach()) < 1e-6
    assert torch.equal(copy, p.bfloat16())
    before = p.clone()
    adamw_in_place(p, g, m, v, copy=copy, scale=one, found_inf=one, **options)
    assert torch.equal(p, before)


@dtypes
@pytest.mark.parametrize("compiles", [False, True])
def test_several_products_with_biases(dtype: torch.dtype, compiles: bool) -> None:
    """Gradients that reach the parts as attention gives them: heads before tokens in memory."""
    shapes = ((4, 2, 16), (4, 16), (4, 16))
    x, weight, bias = (
        rand(*n, seed=i).to(dtype) for i, n in enumerate(((3, 50, 64), (16384,), (256,)))
    )
    grads = [rand(3, 50, *shape, seed=3 + i).to(dtype) for i, shape in enumerate(shapes)]

    def run(device: str, dtype: torch.dtype, fn) -> list[Tensor]:
        leaves = [z.to(device, dtype).requires_grad_() for z in (x, weight, bias)]
        given = [g.to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
        made = fn(*leaves, shapes)
        return [*made, *torch.autograd.grad(made, leaves, given)]

    expected = run("cpu", torch.float64, linear_several)
    found = run("cuda", dtype, compiled(linear_several, compiles))
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        assert distance(got.detach().cpu(), want.detach()) < NARROW[dtype]
