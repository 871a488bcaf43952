"""The debug driver: the same types and numbers as the lowered program, op by op."""

import optree
import pytest
import torch

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.param import Array, Param
from megatree.parallel.assemble import assemble
from megatree.parallel.layout import Layout, Rules, cut
from megatree.parallel.mesh import Mesh
from megatree.parallel.simulate import simulate
from megatree.parallel.threads import Threads
from megatree.parallel.types import make_type
from megatree.runtime.debug import debug

SIZES = {"batch": 4, "seq": 6, "embed": 8, "ffn": 12}
LAYOUT = Layout(Mesh(dp=2, tp=2), Rules(batch="dp", ffn="tp"))
PARAMS = {"norm": Param("embed"), "up": Param("ffn embed"), "down": Param("ffn embed")}
X = Array("batch seq embed", torch.float64, grad=True)


def mlp(w, x):
    y = shard(F.rms_norm(x, w["norm"]), "batch seq embed")
    h = torch.tanh(F.linear(y, w["up"]))
    return x + shard(F.einsum("b t f, f d -> b t d", h, w["down"]), "batch seq embed")


def values():
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    return {"norm": make(8), "up": make(12, 8), "down": make(12, 8)}, make(4, 6, 8)


def test_debug_equals_the_lowered_program_without_any_sync() -> None:
    """Sees an I -> R move that does not sum in backward: debug hoists nothing."""
    w, x = values()
    expected = simulate(mlp, LAYOUT, w, x, axes=(PARAMS, X))
    sizes = LAYOUT.mesh.sizes
    specs = {name: LAYOUT.spec(p.names, tuple(w[name].shape), name) for name, p in PARAMS.items()}
    x_spec = LAYOUT.spec(X.names, tuple(x.shape), "x")

    def rank_main(comm):
        local = {
            k: cut(v, specs[k], sizes, comm.coords).clone().requires_grad_() for k, v in w.items()
        }
        x_local = cut(x, x_spec, sizes, comm.coords).clone().requires_grad_()
        y = debug(
            mlp,
            LAYOUT,
            comm,
            local,
            x_local,
            abstract=(PARAMS, X),
            sizes=SIZES,
            dtype=torch.float64,
        )
        y.backward(torch.ones_like(y))
        return y.detach(), {k: v.grad for k, v in local.items()}, x_local.grad

    results = Threads(sizes).run(rank_main)
    ty = make_type(tuple(x.shape), x.dtype, x_spec, sizes)
    got = assemble([r[0] for r in results], ty, sizes, "y", rtol=1e-12)
    torch.testing.assert_close(got, expected.value, rtol=1e-12, atol=0)
    for name, spec in specs.items():
        ty = make_type(tuple(w[name].shape), torch.float64, spec, sizes)
        got = assemble([r[1][name] for r in results], ty, sizes, name, rtol=1e-12)
        torch.testing.assert_close(got, expected.grads[0][name], rtol=1e-11, atol=1e-12)
    assert optree.tree_leaves(expected.grads[1])


def test_values_are_at_hand_while_the_function_runs() -> None:
    seen = []

    def look(x):
        y = x * 2
        seen.append((tuple(y.shape), tuple(y.value.shape), y.value.sum().item()))
        return y

    def rank_main(comm):
        return debug(
            look,
            LAYOUT,
            comm,
            torch.ones(2, 6, 8),
            abstract=(Array("batch seq embed"),),
            sizes=SIZES,
        )

    Threads(LAYOUT.mesh.sizes).run(rank_main)
    assert seen[0] == ((4, 6, 8), (2, 6, 8), 2.0 * 2 * 6 * 8)


def test_a_local_tensor_of_another_shape_is_refused() -> None:
    def rank_main(comm):
        return debug(
            lambda x: x,
            LAYOUT,
            comm,
            torch.ones(4, 6, 8),
            abstract=(Array("batch seq embed"),),
            sizes=SIZES,
        )

    with pytest.raises(ValueError, match=r"x: the local tensor is \[4, 6, 8\].*gives this rank"):
        Threads(LAYOUT.mesh.sizes).run(rank_main)
