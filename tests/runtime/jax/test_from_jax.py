"""JAX functions inside torch: values and gradients both ways, alone, lowered, and back in JAX."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.op import op
from megatree.functional.param import Param
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.lower import lower
from megatree.parallel.mesh import Mesh
from megatree.parallel.rulecheck import rulecheck
from megatree.parallel.simulate import simulate
from megatree.runtime.jax.from_jax import from_jax
from megatree.runtime.jax.to_jax import to_jax
from tests.runtime.jax.compare import array, differences, in_torch, tensor
from tests.tolerances import RELATIVE, distance

EXACT = RELATIVE[torch.float64]


def jax_layer(params: dict[str, Any], x: Any, ids: Any, scale: float) -> tuple[Any, dict[str, Any]]:
    """Return a tree of floating and integer results from a tree of arguments."""
    hidden = jnp.tanh(x @ params["w"]) * scale
    return hidden + params["b"][ids], {"ids": ids + 1, "x": x}


def torch_layer(params: dict[str, Tensor], x: Tensor, ids: Tensor, scale: float) -> Any:
    hidden = torch.tanh(x @ params["w"]) * scale
    return hidden + params["b"][ids], {"ids": ids + 1, "x": x}


def arguments() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, dtype=torch.float64, generator=g).requires_grad_()  # noqa: E731
    return {"w": make(3, 4), "b": make(5, 4)}, make(2, 3), torch.tensor([1, 4])


def test_trees_values_and_gradients_are_those_of_torch() -> None:
    params, x, ids = arguments()
    leaves = [params["b"], params["w"], x]
    results = []
    for layer in (from_jax(jax_layer), torch_layer):
        y, more = layer(params, x, ids, 2.0)
        first = torch.autograd.grad((y.sin() + more["x"].sum()).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[1].square().sum(), [params["w"], x])
        results.append((y, more["ids"], more["x"], *first, *second))
    for theirs, ours in zip(*results, strict=True):
        assert theirs.dtype == ours.dtype
        assert distance(theirs, ours) < EXACT


def test_gradcheck() -> None:
    params, x, ids = arguments()
    layer = from_jax(jax_layer)

    def f(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return layer({"w": w, "b": b}, x, ids, 0.5)[0]

    operands = (params["w"], params["b"], x)
    assert torch.autograd.gradcheck(f, operands)
    assert torch.autograd.gradgradcheck(f, operands)


def test_a_result_that_is_an_operand_may_be_written_to() -> None:
    """JAX may hand an operand back as it came; torch would then write to both."""
    x = torch.ones(64, dtype=torch.float64)
    moved, same = from_jax(lambda x: (x + 1, x))(x)
    same += 1
    assert x.sum() == 64
    assert moved.sum() == 128


def test_no_gradient_is_recorded_where_none_is_asked_for() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        assert not from_jax(jnp.sin)(x).requires_grad
    assert not from_jax(jnp.sin)(x.detach()).requires_grad
    assert from_jax(jnp.sin)(x).requires_grad


def test_an_operand_written_to_before_backward_is_seen() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    z = x * 2
    y = from_jax(jnp.square)(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        y.sum().backward()


def test_64_bits_that_jax_would_cut_are_refused() -> None:
    with jax.enable_x64(False):
        for x in (torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64)):
            with pytest.raises(
                ValueError, match=r"sin: tensor 0: torch\.\w+64 tensor, and JAX has 64"
            ):
                from_jax(jnp.sin)(x)
        assert from_jax(jnp.sin)(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_threads_share_a_function() -> None:
    f = from_jax(jnp.sin)
    found: dict[int, Tensor] = {}

    def run(i: int) -> None:
        x = torch.full((4,), float(i), dtype=torch.float64, requires_grad=True)
        f(x).sum().backward()
        assert x.grad is not None
        found[i] = x.grad

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, grad in found.items():
        assert distance(grad, torch.full((4,), float(i), dtype=torch.float64).cos()) < EXACT
    assert len(found) == 4


# -- inside lowered functions -------------------------------------------------------------------


def feed_forward(x: Any, up: Any, down: Any) -> Any:
    hidden = jax.nn.gelu(jnp.einsum("btd,fd->btf", x, up))
    return jnp.einsum("btf,fd->btd", hidden, down)


layer = op("b t d!, f+ d!, f+ d! -> b t d!", linear=[[2]])(from_jax(feed_forward))


def block(w: dict[str, Tensor], x: Tensor) -> Tensor:
    y = shard(F.rms_norm(x, w["norm"]), "batch seq embed")
    return x + shard(layer(y, w["up"], w["down"]), "batch seq embed")


PARAMS = {"norm": Param("embed"), "up": Param("ffn embed"), "down": Param("ffn embed")}
LAYOUT = Layout(Mesh(dp=2, tp=2), Rules(batch="dp", ffn="tp"))


def values() -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, dtype=torch.float64, generator=g)  # noqa: E731
    return {"norm": make(8), "up": make(12, 8), "down": make(12, 8)}, make(4, 6, 8)


def test_a_jax_layer_is_cut_over_a_mesh_as_its_signature_says() -> None:
    w, x = values()
    alone = simulate(block, Layout(), w, x, axes=(PARAMS, "batch seq embed"))
    ours = simulate(block, LAYOUT, w, x, axes=(PARAMS, "batch seq embed"))
    assert distance(ours.value, alone.value) < EXACT
    for name in w:
        assert distance(ours.grads[0][name], alone.grads[0][name]) < EXACT
    assert distance(ours.grads[1], alone.grads[1]) < EXACT
    assert ours.counts["psum"] >= 2


def test_rulecheck_judges_the_signature_of_a_jax_layer() -> None:
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, dtype=torch.float64, generator=g)  # noqa: E731
    found = rulecheck(layer, make(2, 2, 4), make(4, 4), make(4, 4))
    assert len(found.legal) >= 5
    free = op("b t d, f+ d, f+ d -> b t d")(from_jax(feed_forward))
    with pytest.raises(RuntimeError, match=r"rulecheck: the rule or the op's local form is wrong"):
        rulecheck(free, make(2, 2, 4), make(4, 4), make(4, 4))


def test_without_a_signature_a_lowered_function_refuses_it() -> None:
    with pytest.raises(ShardingError, match=r"no sharding rule for sin .*Declare it with @op"):
        lower(lambda x: from_jax(jnp.sin)(x), Layout(), PARAMS["norm"], sizes={"embed": 8})


def test_to_jax_runs_the_jax_function_itself() -> None:
    """Both inside an op and called as it is, with a tree of operands."""
    w, x = values()
    (found,) = differences(
        [in_torch(lambda n, u, d, x: block({"norm": n, "up": u, "down": d}, x), (*w.values(), x))],
        layout=LAYOUT,
    )
    assert max(found.values()) < EXACT
    tree = from_jax(lambda p, x: {"y": p["a"] * x, "n": (x > 0, x)})

    def f(a: Tensor, x: Tensor) -> Tensor:
        out = tree({"a": a}, x * 2)
        return (out["y"] * out["n"][0]).sum() + out["n"][1].sum()

    a, x = torch.arange(3.0, dtype=torch.float64) + 1, torch.tensor([-1.0, 2.0, 3.0]).double()
    (found,) = differences([in_torch(f, (a, x))])
    assert max(found.values()) < EXACT
    jaxpr = jax.make_jaxpr(to_jax(lambda x: from_jax(jnp.sin)(x) + 1))(array(x))
    assert "callback" not in str(jaxpr)
    assert next(eqn.primitive.name for eqn in jaxpr.eqns) == "sin"
    assert tensor(to_jax(layer)(array(values()[1]), *map(array, list(w.values())[1:]))).shape == (
        4,
        6,
        8,
    )
