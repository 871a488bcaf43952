"""Attention over a cut sequence under JAX: the same numbers, however the rules lower it."""

from typing import Any

import jax.numpy as jnp
import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.parallel.context import AllGather, Ring, Ulysses
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.order import Zigzag
from megatree.runtime.jax.to_jax import to_jax
from tests.functional.check import rand
from tests.tolerances import RELATIVE, distance

AXES = ("batch seq heads group k", "batch seq heads k", "batch seq heads k")
SHAPES = ((2, 8, 2, 2, 4), (2, 8, 2, 4), (2, 8, 2, 4))


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    q, k, v = (shard(x, axes) for x, axes in zip((q, k, v), AXES, strict=True))
    places = shard(torch.arange(8), "seq")
    o = F.attention(q, k, v, segment_ids=shard(segments, "batch seq"))
    return o * places[:, None, None, None]


@pytest.mark.parametrize("how", [AllGather(), Ring(), Ulysses()], ids=str)
def test_whole_arrays_stay_in_natural_order(how: Any) -> None:
    """Zigzag is the order of our shards alone; positions would be off by it under JAX."""
    where = Layout(Mesh(cp=2), Rules(seq="cp", lower={"attention": how}), order=Zigzag())
    values = [rand(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    values.append(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 2))
    got = to_jax(attend, where)(*(jnp.asarray(x.numpy()) for x in values))
    assert (
        distance(torch.from_numpy(got.__array__().copy()), attend(*values))
        < RELATIVE[torch.float64]
    )
