"""Whole models in JAX: loss and every gradient equal torch's, on one device and on eight."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optree
import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional import keys
from megatree.functional.annotate import shard
from megatree.functional.local_map import Out, local_map
from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import GPTConfig
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.simulate import simulate
from megatree.runtime.jax.arrays import arrays_from_jax, arrays_to_jax
from megatree.runtime.jax.keys import keep_mask
from megatree.runtime.jax.to_jax import to_jax
from tests.runtime.jax.compare import array, differences, in_torch, off, tensor
from tests.runtime.one_device import differentiate, reference
from tests.runtime.table import DEFAULT, MODELS, layouts
from tests.tolerances import RELATIVE, assert_leaves_close, distance

EXACT = RELATIVE[torch.float64]


def assert_like_torch(cfg: GPTConfig, layout: Layout, **options: Any) -> None:
    """Compare loss and gradients of a microbatch in JAX, laid out, with plain torch."""
    ref = reference(cfg)
    batch = ref.batches[0]
    loss, grads = differentiate(ref.model, ref.params, [batch])

    def mean_loss(params: Any, batch: Any) -> Tensor:
        total, weight = ref.model.apply(params, batch)[1]["loss"]["terms"]["loss"]
        return total / weight

    run = jax.jit(jax.value_and_grad(to_jax(mean_loss, layout, **options)))
    value, got = run(
        arrays_to_jax(ref.params, layout, ref.model.params),
        arrays_to_jax(batch, layout, ref.model.batch),
    )
    names, leaves, _ = flatten_with_names(arrays_from_jax(got))
    found = {"loss": tensor(value), **dict(zip(names, leaves, strict=True))}
    assert_leaves_close(found, {"loss": loss, **grads})


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=() if name == "gpt2 dropout" else pytest.mark.full)
        for name in MODELS
    ],
)
def test_a_model_on_one_device(model: str) -> None:
    assert_like_torch(MODELS[model], Layout())


QUICK_ROWS = {
    ("llama tied", "dp2 tp4 sp"),
    ("gpt2 dropout", "tp over two, swapped"),
    ("few kv", "refined sp"),
}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(
            model,
            name,
            id=f"{model} on {name}",
            marks=() if (model, name) in QUICK_ROWS else pytest.mark.full,
        )
        for model, names in DEFAULT.items()
        for name in dict.fromkeys([*names, *(n for m, n in QUICK_ROWS if m == model)])
        if name != "one rank"
    ],
)
def test_a_model_on_a_mesh(model: str, name: str) -> None:
    """XLA chooses the collectives from the rules' constraints; the numbers must not know."""
    assert_like_torch(replace(MODELS[model], num_layers=1), layouts(model)[name])


def test_a_wrong_form_in_a_model_is_seen() -> None:
    """Sees a comparison that cannot fail: a norm without its epsilon, off by 1e-5."""

    def no_epsilon(x: Any, w: Any, *, eps: float) -> Any:
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) * w

    cfg = replace(MODELS["llama"], num_layers=1)
    with pytest.raises(AssertionError, match=r"1\d of 1\d leaves: loss: off by"):
        assert_like_torch(cfg, Layout(), forms={F.rms_norm: no_epsilon})


# -- layouts ------------------------------------------------------------------------------------

LAYOUT = Layout(Mesh(dp=2, tp=2), Rules(batch="dp", ffn="tp"))


def test_a_shard_is_a_constraint_by_the_rules() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        return shard(x * 2, "batch ffn"), shard(x * 3, "_ embed")

    cut, whole = jax.jit(to_jax(f, LAYOUT))(jnp.ones((4, 6)))
    assert cut.sharding.spec == jax.sharding.PartitionSpec("dp", "tp")
    assert cut.sharding.shard_shape(cut.shape) == (2, 3)
    assert whole.sharding.is_fully_replicated
    assert len(whole.sharding.device_set) == 4


def test_errors_of_names_and_sizes_are_those_of_lower() -> None:
    with pytest.raises(ShardingError, match=r"shard 'batch ffn': dim 1 \('ffn', size 5\) does not"):
        to_jax(lambda x: shard(x, "batch ffn"), LAYOUT)(jnp.ones((4, 5)))
    with pytest.raises(
        ShardingError, match=r"axis 'batch' has size 6 here and size 4 at .*test_to"
    ):
        to_jax(lambda x: shard(x, "batch _") + shard(x.T, "batch _").T)(jnp.ones((4, 6)))
    with pytest.raises(ShardingError, match=r"dp=16 has 16 ranks, JAX has 8 devices\. Give more"):
        to_jax(lambda x: x, Layout(Mesh(dp=16)))


def test_a_function_is_traced_once_per_shapes() -> None:
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return x + 1

    run = to_jax(f)
    for shape in [(2,), (2,), (3,), (2,)]:
        run(jnp.ones(shape))
    assert calls == [(2,), (3,)]


def test_transforms_of_jax_apply() -> None:
    run = to_jax(lambda w, x: torch.tanh(F.linear(x, w)).sum())
    w, x = jnp.ones((3, 4)) / 10, jnp.arange(8.0).reshape(2, 4)
    each = jax.vmap(jax.grad(run), (None, 0))(w, x)
    for i in range(2):
        assert off(tensor(each[i]), tensor(jax.grad(run)(w, x[i]))) < EXACT


# -- local_map ----------------------------------------------------------------------------------


class _Rotated(torch.autograd.Function):
    """A body's own backward, which no trace sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 2


def body(comm: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Contract a cut dim by hand, and count the elements."""
    y = comm.psum(torch.einsum("bf,fd->bd", x, w), "ffn")
    return y, torch.tanh(x).sum(-1)


OUT = [Out("batch embed", replicated=("ffn",)), Out("batch", partial=("ffn",))]
IN = ["batch ffn", "ffn embed"]


def test_a_body_runs_as_on_one_device() -> None:
    by_hand = local_map(body, in_axes=IN, out_axes=OUT)

    def f(x: Tensor, w: Tensor) -> Tensor:
        y, n = by_hand(shard(x, "batch ffn"), w)
        return shard(y, "batch embed").square().sum() + shard(n, "batch").sum()

    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, generator=g)
    w = torch.randn(6, 8, dtype=torch.float64, generator=g)
    for layout in (None, LAYOUT):
        (found,) = differences([in_torch(f, (x, w))], layout=layout)
        assert max(found.values()) < EXACT
    ours = simulate(f, LAYOUT, x, w, axes=("batch ffn", "ffn embed"))
    value, grads = jax.value_and_grad(to_jax(f, LAYOUT), (0, 1))(array(x), array(w))
    assert distance(tensor(value), ours.value) < EXACT
    for a, b in zip(grads, ours.grads, strict=True):
        assert distance(tensor(a), b) < EXACT


def test_a_body_with_a_backward_of_its_own_runs_its_reference() -> None:
    def opaque(comm: Any, x: Tensor) -> Tensor:
        return _Rotated.apply(x)

    with_reference = local_map(
        opaque, in_axes=["batch ffn"], out_axes="batch ffn", reference=lambda x: x * 2
    )
    without = local_map(opaque, in_axes=["batch ffn"], out_axes="batch ffn")
    x = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    (found,) = differences([in_torch(with_reference, (x,))], layout=LAYOUT)
    assert max(found.values()) == 0.0
    with pytest.raises(
        ShardingError, match=r"local_map opaque: has no JAX form, and its body cannot be traced"
    ):
        to_jax(without)(array(x))
    (found,) = differences([in_torch(without, (x,))], forms={without: lambda x: 2 * x})
    assert max(found.values()) == 0.0


def test_an_output_without_a_gradient_has_none_in_jax() -> None:
    def both(comm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3

    f = local_map(both, in_axes=["batch"], out_axes=[Out("batch"), Out("batch", grad=False)])
    run = to_jax(lambda x: sum(y.sum() for y in f(x)))
    assert jax.grad(run)(jnp.ones(4)).tolist() == [2.0] * 4


# -- random numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 7, -1, -(2**63), 2**63 - 1, 0x9E3779B97F4A7C15])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999])
def test_dropout_has_the_same_bits(key: int, rate: float) -> None:
    shape = (3, 5, 7)
    box = tuple((0, n) for n in shape)
    signed = keys._signed(key)
    ours = keys.keep_mask(signed, keys.box_index(shape, box), rate)
    assert torch.equal(tensor(keep_mask(key, shape, rate)), ours)
    assert torch.equal(tensor(keep_mask(jnp.int64(signed), shape, rate)), ours)


def test_folded_keys_have_the_same_bits() -> None:
    def f(key: Tensor, layer: Tensor) -> Any:
        return F.fold(key, "attention", layer, 3)

    for key in (0, -5, 2**62 + 1):
        ours = f(torch.tensor(key), torch.tensor(11))
        assert int(to_jax(f)(jnp.int64(key), jnp.int64(11))) == ours.item()


def test_keys_of_32_bits_are_refused() -> None:
    """Without 64 bits JAX would wrap silently, and drop other elements than torch."""
    x, key = jnp.ones((4, 4), jnp.float32), jnp.int32(7)
    with jax.enable_x64(False):
        for f in (
            lambda x, k: F.dropout(x, k, rate=0.5),
            lambda x, k: x * torch.mul(1, F.fold(k, "name")),
        ):
            with pytest.raises(
                ValueError, match=r"keyed random numbers are 64-bit integers, which"
            ):
                to_jax(f)(x, key)


def test_a_model_of_32_bits_runs_without_64() -> None:
    """Tokens are int32 then, as JAX makes them."""
    ref = reference(MODELS["llama tied"])
    params = optree.tree_map(lambda w: w.float(), ref.params)
    batch = {**ref.batches[0]}

    def f(params: Any, batch: Any) -> Tensor:
        return ref.model.apply(params, batch)[1]["loss"]["terms"]["loss"][0]

    ours = f(params, batch)
    with jax.enable_x64(False):
        small = {
            k: jnp.asarray(v.int().numpy() if v.dtype == torch.int64 else v.numpy())
            for k, v in batch.items()
        }
        theirs = jax.jit(to_jax(f))(arrays_to_jax(params), small)
    assert theirs.dtype == jnp.float32
    assert distance(tensor(theirs), ours) < RELATIVE[torch.float32]
