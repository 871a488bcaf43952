"""Muon makes the update of its paper, and a matrix that is cut gets the one of a whole one."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatree.runtime.optimizers import (
    GroupRule,
    Matrix,
    adamw,
    by_aspect,
    like_adam,
    muon,
    orthogonalize,
    sgd,
)
from tests.tolerances import distance


def same(x: Tensor) -> Tensor:
    """Return what one device gathers, or cuts."""
    return x


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def reference(
    w: Tensor, grads: list[Tensor], scale: float, *, nesterov: bool, lr: float, decay: float
) -> Tensor:
    """Return a matrix after Muon, by its singular values: what the iteration does to each."""
    b = torch.zeros_like(w)
    for g in grads:
        b = 0.95 * b + 0.05 * g
        ahead = 0.95 * b + 0.05 * g if nesterov else b
        u, s, vh = torch.linalg.svd(ahead, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        w = w * (1 - lr * decay) - lr * scale * (u * s) @ vh
    return w


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize(
    ("rule", "nesterov", "columns_are_inputs"),
    [(by_aspect, True, True), (like_adam, False, True), (by_aspect, False, False)],
)
def test_it_is_the_published_algorithm(
    shape: tuple[int, int],
    rule: Callable[[int, int], float],
    nesterov: bool,
    columns_are_inputs: bool,
) -> None:
    m, n = shape
    matrix = Matrix(
        start=0, shape=shape, gather=same, cut=same, columns_are_inputs=columns_are_inputs
    )
    groups = {"w": GroupRule(lr=0.5, decay=2.0, matrices=(matrix,))}
    optimizer = muon(0.02, others=sgd(1.0), nesterov=nesterov, scale_rule=rule, weight_decay=0.1)
    start = draw(0, 2, m * n)
    params = {"w": start.clone()}
    state = optimizer.init(params, groups)
    assert list(state) == ["muon"]
    for step in range(10):
        optimizer.update(params, {"w": draw(step + 1, 2, m * n)}, state, step=step, groups=groups)
    num_out, num_in = (m, n) if columns_are_inputs else (n, m)
    scale = max(1.0, num_out / num_in) ** 0.5 if rule is by_aspect else 0.2 * math.sqrt(max(m, n))
    for row in range(2):
        expected = reference(
            start[row].view(m, n),
            [draw(step + 1, 2, m * n)[row].view(m, n) for step in range(10)],
            scale,
            nesterov=nesterov,
            lr=0.01,
            decay=0.2,
        )
        assert distance(params["w"][row].view(m, n), expected) < 1e-12


def test_in_bf16_it_is_close_to_that_of_torch() -> None:
    w = torch.nn.Parameter(draw(0, 16, 8, dtype=torch.float32))
    theirs = torch.optim.Muon([w], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    matrix = Matrix(start=0, shape=(16, 8), gather=same, cut=same)
    groups = {"w": GroupRule(matrices=(matrix,))}
    ours = muon(0.1, others=sgd(1.0), compute=torch.bfloat16)
    start = w.detach().clone()
    params = {"w": start.reshape(1, -1).clone()}
    state = ours.init(params, groups)
    for step in range(10):
        grad = draw(step + 1, 16, 8, dtype=torch.float32)
        w.grad = grad
        theirs.step()
        ours.update(params, {"w": grad.reshape(1, -1)}, state, step=step, groups=groups)
    way = (w.detach() - start).norm()
    assert (params["w"].view(16, 8) - w.detach()).norm() < 2e-2 * way


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(draw(3, 2, 12, 20)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_cut_matrix_gets_the_update_of_a_whole_one() -> None:
    """Two ranks hold half of the columns each; a rank's gather sees the other's momentum."""
    rows, m, n, ranks = 3, 4, 6, 2

    def run(shards: int) -> Tensor:
        """Step all ranks side by side, with a rendezvous made of a list."""
        width = n // shards
        whole = draw(0, rows, m, n)
        pieces = [whole[..., r * width : (r + 1) * width].reshape(rows, -1) for r in range(shards)]
        optimizer = muon(0.1, others=sgd(1.0), rows_at_once=2 if shards == 1 else 3)
        states = [optimizer.init({"w": p}) for p in pieces]
        for step in range(4):
            grad = draw(step + 1, rows, m, n)
            parts = [grad[..., r * width : (r + 1) * width] for r in range(shards)]
            averages = [
                torch.lerp(part, states[r]["muon"]["w"].view(part.shape), 0.95)
                for r, part in enumerate(parts)
            ]
            ahead = [torch.lerp(p, a, 0.95) for p, a in zip(parts, averages, strict=True)]
            for r in range(shards):
                matrix = Matrix(
                    start=0,
                    shape=(m, width),
                    gather=lambda x, ahead=ahead: torch.cat(ahead, dim=-1) if shards > 1 else x,
                    cut=lambda x, r=r: x[..., r * width : (r + 1) * width],
                )
                optimizer.update(
                    {"w": pieces[r]},
                    {"w": parts[r].reshape(rows, -1).clone()},
                    states[r],
                    step=step,
                    groups={"w": GroupRule(matrices=(matrix,))},
                )
        return torch.cat([p.view(rows, m, width) for p in pieces], dim=-1)

    assert torch.equal(run(ranks), run(1))


def test_a_stack_of_experts_is_as_many_matrices() -> None:
    size = 3 * 4 * 5
    apart = tuple(Matrix(start=20 * i, shape=(4, 5), gather=same, cut=same) for i in range(3))
    stacked = (Matrix(start=0, shape=(3, 4, 5), gather=same, cut=same, num_batch_dims=1),)
    got = []
    for matrices in (apart, stacked):
        params, groups = {"w": draw(0, 2, size)}, {"w": GroupRule(matrices=matrices)}
        optimizer = muon(0.1, others=sgd(1.0))
        state = optimizer.init(params, groups)
        optimizer.update(params, {"w": draw(1, 2, size)}, state, step=0, groups=groups)
        got.append(params["w"])
    assert distance(got[0], got[1]) < 1e-13


def test_leading_dims_are_the_rows_of_a_matrix() -> None:
    got = []
    for shape in ((2, 2, 3, 5), (12, 5)):
        groups = {"w": GroupRule(matrices=(Matrix(start=0, shape=shape, gather=same, cut=same),))}
        params = {"w": draw(0, 2, 60)}
        optimizer = muon(0.1, others=sgd(1.0))
        state = optimizer.init(params, groups)
        optimizer.update(params, {"w": draw(1, 2, 60)}, state, step=0, groups=groups)
        got.append(params["w"])
    assert torch.equal(*got)


def test_other_leaves_go_to_the_other_optimizer() -> None:
    matrix = Matrix(start=3, shape=(2, 4), gather=same, cut=same)
    groups = {"mixed": GroupRule(matrices=(matrix,)), "plain": GroupRule(lr=0.5)}
    optimizer = muon(0.1, others=adamw(0.01))
    params = {"mixed": draw(0, 2, 15), "plain": draw(1, 1, 4)}
    expected = {name: p.clone() for name, p in params.items()}
    state = optimizer.init(params, groups)
    assert {entry: list(of) for entry, of in state.items()} == {
        "muon": ["mixed"],
        "m": ["mixed", "plain"],
        "v": ["mixed", "plain"],
    }
    alone = adamw(0.01)
    alone_state = alone.init(expected)
    for step in range(3):
        grads = {"mixed": draw(2 + step, 2, 15), "plain": draw(9 + step, 1, 4)}
        copies = {name: g.clone() for name, g in grads.items()}
        optimizer.update(params, grads, state, step=step, groups=groups)
        alone.update(expected, copies, alone_state, step=step, groups=groups)
    assert distance(params["plain"], expected["plain"]) < 1e-13
    rest = [i for i in range(15) if not 3 <= i < 11]
    assert distance(params["mixed"][:, rest], expected["mixed"][:, rest]) < 1e-13
    assert not torch.equal(params["mixed"][:, 3:11], expected["mixed"][:, 3:11])
    assert not state["m"]["mixed"][:, 3:11].any()
