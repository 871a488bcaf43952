"""Our types against JAX's own: explicit mode infers the same, and its cotangents are our duals."""

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.sharding import PartitionSpec

from megatree.models.gpt import gpt
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.rulecheck import placements
from megatree.parallel.types import R
from megatree.runtime.jax.shardings import (
    abstract_array,
    explicit_mesh,
    from_partition_spec,
    to_partition_spec,
)
from megatree.runtime.jax.trace import trace_global
from megatree.runtime.jax.typeof import TypeReport, compare_model_types, compare_types
from tests.parallel.rule_cases import Case
from tests.parallel.worlds import all_types
from tests.runtime.jax.op_cases import call, cases
from tests.runtime.table import MODELS, layouts

ROWS = [
    pytest.param(model, name, marks=() if quick else pytest.mark.full, id=f"{model} on {name}")
    for model, quick_names in {
        "llama": ["dp2 tp4 sp", "sp over more"],
        "gpt2 dropout": ["mixed", "tp over two, swapped"],
        "mqa": ["two dp axes"],
        "few kv": ["refined sp"],
    }.items()
    for name in layouts(model)
    for quick in [name in quick_names]
    if name != "one rank"
]


@pytest.mark.parametrize(("model", "name"), ROWS)
def test_a_model_is_typed_as_jax_types_it(model: str, name: str) -> None:
    """Every op and move of every unit: JAX infers our type, or accepts it where it must be told."""
    layout = layouts(model)[name]
    program = lower_model(gpt(MODELS[model], batch_size=8, dtype=torch.float64), layout)
    report = compare_model_types(program)
    assert report.different == ()
    assert report.silent == {}
    assert not report.summed
    assert report.same.total() > 15
    assert report.told["move"] > 0


# JAX lays zeros_like(x) out as x even if x is a pending sum, where its ones_like counts n times.
LIKE_A_SUM = {
    f"{op}: float64[4, 6] here, float64[4, 6] P(a) in JAX"
    for op in ("zeros_like", "ones_like", "full_like")
}


def typed_as_jax_types(named: Iterable[tuple[str, Any, Case]]) -> TypeReport:
    """Compare the types of some ops wherever a rule allows a placement; I and R are one to JAX."""
    sizes = {"a": 2}
    layout = Layout(Mesh(**sizes))
    graphs = []
    for _, function, case in named:
        options = [
            [ty for ty in placements(x, sizes, case.grad) if ty.state("a") != R]
            for x in case.operands
        ]
        for placement in itertools.product(*options):
            try:
                traced = trace_global(partial(call, function, case), layout, *placement)
            except ShardingError:
                continue
            graphs.append(traced.graph)
    report = compare_types(graphs, sizes)
    assert {text.partition(": ")[2] for text in report.different} == LIKE_A_SUM
    assert set(report.silent) <= set(report.same) | set(report.told)
    return report


def test_ops_are_typed_as_jax_types_them() -> None:
    """The first call of every op."""
    first = {name: (name, functions[0], case) for name, functions, case in [*cases()][::-1]}
    report = typed_as_jax_types(first.values())
    assert report.same.total() > 700
    assert report.told.total() > 100


@pytest.mark.full
def test_all_calls_of_ops_are_typed_as_jax_types_them() -> None:
    report = typed_as_jax_types((name, f, case) for name, fs, case in cases() for f in fs)
    assert report.same.total() > 1900
    assert report.told.total() > 200
    assert set(report.summed) == {"einsum 'td->d'", "expert_counts", "linear_cross_entropy"}


def test_a_type_that_jax_does_not_infer_is_seen() -> None:
    """Sees a comparison that cannot fail: one cut is moved to the other dim."""
    sizes = {"a": 2}
    ty = from_partition_spec(PartitionSpec("a", None), (4, 6), torch.float64, sizes, grad=True)
    graph = trace_global(lambda x: torch.tanh(x), Layout(Mesh(**sizes)), ty).graph
    assert compare_types([graph], sizes).different == ()
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["type"] = from_partition_spec(
                PartitionSpec(None, "a"), (4, 6), torch.float64, sizes, grad=True
            )
    (text,) = compare_types([graph], sizes).different
    assert text.endswith("tanh: float64[4, 6/a] here, float64[4/a, 6] in JAX")


SIZES = {"a": 2, "b": 4}


def test_types_and_partition_specs_are_inverse() -> None:
    types = all_types(SIZES, (16, 16))
    assert len(types) == 27
    for ty in types:
        spec = to_partition_spec(ty)
        assert from_partition_spec(spec, ty.shape, ty.dtype, SIZES, grad=True) == ty


def test_cotangents_are_our_duals() -> None:
    """JAX's `reduced` is our R and its `unreduced` our P: each is the cotangent of the other."""
    mesh = explicit_mesh(SIZES)
    for ty in all_types(SIZES, (16, 16)):
        seen = []

        def see(x: jax.Array, seen: list = seen) -> jax.Array:
            seen.append(jax.typeof(x).to_ct_aval().sharding.spec)
            return x

        with jax.sharding.use_abstract_mesh(mesh):
            jax.eval_shape(see, abstract_array(ty, mesh, to_partition_spec(ty)))
        dual = from_partition_spec(seen[0], ty.shape, ty.dtype, SIZES, grad=True)
        assert dual == ty.dual, f"{ty}: {ty.dual} here, {dual} in JAX"


def test_the_gradient_of_a_replicated_weight_is_a_pending_sum_in_jax_too() -> None:
    mesh = explicit_mesh(SIZES)

    def gradients(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda x, w: jnp.einsum("td,vd->tv", x, w), x, w)
        return pull(out)

    x = from_partition_spec(PartitionSpec("a"), (4, 6), torch.float64, SIZES, grad=True)
    w = from_partition_spec(PartitionSpec(), (8, 6), torch.float64, SIZES, grad=True)
    wide = w.with_kinds({"a": "R"})
    arrays = [abstract_array(ty, mesh, to_partition_spec(ty)) for ty in (x, wide)]
    with jax.sharding.use_abstract_mesh(mesh):
        _, grad = jax.eval_shape(gradients, *arrays)
    found = from_partition_spec(grad.sharding.spec, w.shape, w.dtype, SIZES, grad=True)
    assert found == wide.dual
    assert found.state("a") == "P"
