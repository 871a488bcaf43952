"""JAX on one GPU: arrays share memory, a JAX layer runs inside torch, a whole model agrees."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optree
import pytest
import torch
from torch import Tensor

from megatree.functional import keys
from megatree.functional.tree import flatten_with_names
from megatree.runtime.jax.arrays import arrays_from_jax, arrays_to_jax
from megatree.runtime.jax.from_jax import from_jax
from megatree.runtime.jax.keys import keep_mask
from megatree.runtime.jax.to_jax import to_jax
from tests.runtime.one_device import differentiate, reference
from tests.runtime.table import MODELS
from tests.tolerances import assert_leaves_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def _sixty_four_bits() -> Iterator[None]:
    if jax.default_backend() != "gpu":
        pytest.skip("needs a JAX that sees the GPU (jax[cuda])")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_arrays_share_memory_both_ways(dtype: torch.dtype) -> None:
    x = torch.arange(4096, device="cuda").to(dtype)
    (y,) = arrays_to_jax((x,))
    assert y.unsafe_buffer_pointer() == x.data_ptr()
    (back,) = arrays_from_jax((y,))
    assert back.data_ptr() == x.data_ptr()
    (moved,) = arrays_from_jax((y + 1,))
    assert moved.is_cuda
    assert torch.equal(moved, x + 1)


def test_streams_wait_for_each_other() -> None:
    """Torch and JAX run on streams of their own; each must see what the other has finished."""
    f = from_jax(lambda x: jnp.tanh(x @ x.T) / 1024)
    x = torch.eye(1024, device="cuda", dtype=torch.float64)
    for _ in range(20):
        y = f(x * 2.0)
        assert torch.allclose(y.sum(), torch.tanh(x @ x.T * 4).sum() / 1024, rtol=1e-12)
        x = x + 0.001 * y


def test_a_jax_layer_has_gradients() -> None:
    def layer(x: Any, w: Any) -> Any:
        return jax.nn.gelu(x @ w, approximate=True)

    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(64, 64, dtype=torch.float64, generator=g).cuda() for _ in range(2))
    results = []
    for f in (
        from_jax(layer),
        lambda x, w: torch.nn.functional.gelu(x @ w, approximate="tanh"),
    ):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = f(*leaves)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for theirs, ours in zip(*results, strict=True):
        assert theirs.is_cuda
        assert torch.allclose(theirs, ours, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["llama tied", "gpt2 dropout", "mqa"])
def test_a_model_agrees_with_torch_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    """Loss and all gradients; float32 too, which XLA would multiply in TF32 if not told."""
    ref = reference(MODELS[name])
    model = replace(ref.model, dtype=dtype)
    params = optree.tree_map(lambda x: x.to(dtype), ref.params)
    batch = ref.batches[0]
    loss, grads = differentiate(model, params, [batch])

    def mean_loss(params: Any, batch: Any) -> Tensor:
        total, weight = model.apply(params, batch)[1]["loss"]["terms"]["loss"]
        return total / weight

    def on_gpu(tree: Any) -> Any:
        return arrays_to_jax(optree.tree_map(lambda x: x.cuda(), tree))

    value, got = jax.jit(jax.value_and_grad(to_jax(mean_loss)))(on_gpu(params), on_gpu(batch))
    names, leaves, _ = flatten_with_names(arrays_from_jax(got))
    assert all(leaf.is_cuda for leaf in leaves)
    found = {"loss": torch.tensor(float(value), dtype=dtype)}
    found.update(zip(names, (leaf.cpu() for leaf in leaves), strict=True))
    expected = {"loss": loss, **grads}
    if dtype == torch.float32 and "blocks.dense.bk" in expected:
        del found["blocks.dense.bk"], expected["blocks.dense.bk"]  # truly 0: rounding alone
    assert_leaves_close(found, expected, dtype)


def test_dropout_has_the_same_bits() -> None:
    shape = (33, 65)
    ours = keys.keep_mask(-7, keys.box_index(shape, tuple((0, n) for n in shape)), 0.3)
    (theirs,) = arrays_from_jax((keep_mask(-7, shape, 0.3),))
    assert torch.equal(theirs.cpu(), ours)
