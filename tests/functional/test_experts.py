"""Layers of local experts: grouped products against one product per expert; dispatch to both."""

import sys
import types

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional import experts_te
from megatree.functional.experts import Products, expert_rows
from tests.tolerances import RELATIVE, assert_leaves_close

grouped = pytest.mark.skipif(
    not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product"
)
COUNTS = (3, 0, 7, 2)


def drawn(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((12, 16), (12, 1), (4, 8, 16), (4, 8, 16), (4, 8, 16))
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]


def run(dtype: torch.dtype, products: Products) -> dict[str, Tensor]:
    """Return the result and all gradients."""
    rows, gates, *weights = leaves = drawn(dtype)
    y = expert_rows(rows, gates, COUNTS, weights, F.swiglu, products=products)
    (y * torch.arange(16)).sum().backward()
    found = {str(i): leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    assert len(found) == 5
    return {"y": y.detach(), **found}


@grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_grouped_product_is_a_product_per_expert(dtype: torch.dtype) -> None:
    """An expert without rows lies between others; its weights have the gradient 0."""
    got, expected = run(dtype, "grouped"), run(dtype, "loop")
    assert_leaves_close(got, expected, dtype)
    for i in "234":
        assert got[i][1].count_nonzero() == 0


def test_rows_are_what_each_expert_makes_of_them() -> None:
    rows, gates, gate, up, down = drawn(torch.float64)
    y = expert_rows(rows, gates, COUNTS, (gate, up, down), F.swiglu)
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    each = [
        (F.swiglu(rows[i] @ gate[e].t(), rows[i] @ up[e].t()) @ down[e]) * gates[i]
        for i, e in enumerate(expert.tolist())
    ]
    assert (y - torch.stack(each)).norm() < RELATIVE[torch.float64] * y.norm()


@pytest.mark.parametrize("products", ["loop", pytest.param("grouped", marks=grouped)])
def test_rows_of_no_expert_lie_behind_all_others(products: Products) -> None:
    """Counts are a tensor; what is behind their sum changes nothing, whatever it is."""
    rows, gates, *weights = drawn(torch.float32)
    expected = expert_rows(rows, gates, COUNTS, weights, F.swiglu, products="loop")
    more, beside = (torch.cat([x, x[:2] * torch.inf]) for x in (rows, gates))
    counts = torch.tensor(COUNTS)
    y = expert_rows(more, beside, counts, weights, F.swiglu, products=products)
    assert_leaves_close({"y": y[:12].detach()}, {"y": expected.detach()}, torch.float32)
    slopes = torch.autograd.grad(y[:12].sum(), weights)
    exact = torch.autograd.grad(expected.sum(), weights)
    assert_leaves_close(
        dict(zip("abc", slopes, strict=True)), dict(zip("abc", exact, strict=True)), torch.float32
    )


@grouped
def test_a_grouped_product_that_cannot_be_had_is_refused() -> None:
    rows, gates, *weights = drawn(torch.float64)
    text = (
        r'experts: no grouped product: it is not made for torch\.float64 on cpu\. Use products="l'
    )
    with pytest.raises(ValueError, match=text):
        expert_rows(rows, gates, COUNTS, weights, F.swiglu, products="grouped")
    narrow = [w.float()[:, :6] for w in weights]
    with pytest.raises(ValueError, match=r"sizes \[6\] are not multiples of 16 bytes"):
        expert_rows(rows.float(), gates, COUNTS, narrow, F.swiglu, products="grouped")


class Linear(torch.nn.Module):
    """What Transformer Engine's grouped linear layer computes."""

    def __init__(
        self, num: int, width_in: int, width_out: int, *, bias: bool, params_dtype: torch.dtype,
        device: str,
    ) -> None:  # fmt: skip
        super().__init__()
        assert not bias
        self.shape = (width_out, width_in)
        for i in range(num):
            weight = torch.empty(width_out, width_in, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight))

    def forward(self, rows: Tensor, splits: list[int]) -> Tensor:
        assert self.weight0.shape == self.shape
        parts = enumerate(rows.split(splits))
        return torch.cat([part @ getattr(self, f"weight{i}").t() for i, part in parts])


def test_transformer_engine_is_given_our_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for its layer: an order of weights or a transpose that is wrong."""
    engine = types.ModuleType("transformer_engine.pytorch")
    monkeypatch.setattr(engine, "GroupedLinear", Linear, raising=False)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    monkeypatch.setattr(experts_te, "why_not", lambda _: "")
    experts_te._layer.cache_clear()
    got, expected = run(torch.float64, "transformer_engine"), run(torch.float64, "loop")
    experts_te._layer.cache_clear()
    assert_leaves_close(got, expected)


def test_an_engine_that_is_not_there_is_refused() -> None:
    rows, gates, *weights = drawn(torch.float64)
    with pytest.raises(ValueError, match=r"experts: no grouped product: (transf|it works on GPUs)"):
        expert_rows(rows, gates, COUNTS, weights, F.swiglu, products="transformer_engine")


@pytest.mark.parametrize("capacity", [None, 4, 9])
def test_dispatch_is_the_sum_over_choices(capacity: int | None) -> None:
    """Against one product per token and choice, with choices that were dropped."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 16, generator=g, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(2, 5, 2, generator=g, dtype=torch.float64, requires_grad=True)
    choice = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(10)]).view(2, 5, 2)
    choice[0, 1, 0] = choice[1, 4] = 4  # no expert
    choice = F.drop_over_capacity(gates, choice, num_experts=4, capacity=4)
    _, _, *weights = drawn(torch.float64)
    y = F.experts(x, gates, choice, weights, capacity=capacity)
    gate, up, down = weights
    hidden = F.swiglu(torch.einsum("btd,efd->btef", x, gate), torch.einsum("btd,efd->btef", x, up))
    each = torch.einsum("btef,efd->bted", hidden, down)
    each = torch.cat([each, torch.zeros(2, 5, 1, 16, dtype=torch.float64)], 2)
    index = choice.unsqueeze(-1).expand(-1, -1, -1, 16)
    expected = (each.gather(2, index) * gates.unsqueeze(-1)).sum(2)
    leaves = [x, gates, *weights]
    got = torch.autograd.grad(y.square().sum(), leaves)
    want = torch.autograd.grad(expected.square().sum(), leaves)
    assert_leaves_close(
        {"y": y.detach(), **dict(zip("xgabc", got, strict=True))},
        {"y": expected.detach(), **dict(zip("xgabc", want, strict=True))},
    )
