"""Arrays to and from JAX: the same memory on one device, the rules' pieces on a mesh."""

import re
from typing import Any

import jax
import pytest
import torch
from jax.sharding import PartitionSpec
from torch import Tensor

from megatree.functional.param import Array, Param
from megatree.parallel.assemble import points
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules, cut
from megatree.parallel.mesh import Mesh
from megatree.parallel.types import make_type
from megatree.runtime.jax.arrays import arrays_from_jax, arrays_to_jax
from megatree.runtime.jax.shardings import (
    from_partition_spec,
    jax_mesh,
    rules_from_specs,
    rules_to_specs,
)
from tests.runtime.jax.compare import tensor

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool,
    torch.int64, torch.int32, torch.int8, torch.uint8,
]  # fmt: skip


def pointer(x: Any) -> int:
    return x.data_ptr() if isinstance(x, Tensor) else x.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_device_shares_memory_both_ways(dtype: torch.dtype) -> None:
    x = torch.arange(12).reshape(3, 4).to(dtype)
    (y,) = arrays_to_jax((x,))
    assert str(y.dtype) == str(dtype).removeprefix("torch.")
    assert pointer(y) == pointer(x)
    (back,) = arrays_from_jax((y,))
    assert back.dtype == dtype
    assert pointer(back) == pointer(x)
    assert torch.equal(back.double(), x.double())


def test_a_tree_keeps_its_structure_and_values() -> None:
    tree = {"b": [torch.ones(2, requires_grad=True)], "a": (torch.tensor(3.0), torch.zeros(0, 2))}
    out = arrays_to_jax(tree)
    assert isinstance(out["a"], tuple)
    assert isinstance(out["b"], list)
    back = arrays_from_jax(out)
    assert back["a"][0].item() == 3.0
    assert back["a"][1].shape == (0, 2)
    assert not back["b"][0].requires_grad


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :1],
        lambda x: x.T,
        lambda x: x[:1].expand(5, 4),
        lambda x: x[1:],
        lambda x: x[::2],
    ],
)
def test_a_view_that_jax_cannot_hold_is_copied(view: Any) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    y = arrays_to_jax({"x": view(x)})["x"]
    assert torch.equal(tensor(y).float(), view(x))


def test_64_bits_that_jax_would_cut_are_refused() -> None:
    """JAX itself makes int32 of int64 without a word."""
    with (
        jax.enable_x64(False),
        pytest.raises(
            ValueError, match=r"a\.b: torch\.int64 tensor, and JAX has 64 bits switched off\. Set"
        ),
    ):
        arrays_to_jax({"a": {"b": torch.tensor([2**40])}})


LAYOUT = Layout(Mesh(dp=2, tp=4), Rules(batch="dp", ffn=("tp", "dp"), heads="tp"))


def test_a_mesh_has_the_pieces_that_the_ranks_have() -> None:
    """Device r holds what rank r holds, swapped axes included."""
    x, w = torch.arange(32.0).reshape(4, 8), torch.arange(48.0).reshape(16, 3)
    axes = {"x": Array("batch heads", torch.float32), "w": "ffn embed"}
    out = arrays_to_jax({"x": x, "w": w}, LAYOUT, axes)
    for name, whole, names in (("x", x, ("batch", "heads")), ("w", w, ("ffn", "embed"))):
        spec = LAYOUT.spec(names, tuple(whole.shape), name)
        pieces = sorted(out[name].addressable_shards, key=lambda s: s.device.id)
        assert len(pieces) == 8
        for piece, at in zip(pieces, points(LAYOUT.sizes), strict=True):
            mine = cut(whole, spec, LAYOUT.sizes, at)
            assert torch.equal(tensor(piece.data).float(), mine)
    back = arrays_from_jax(out)
    assert torch.equal(back["x"], x)
    assert torch.equal(back["w"], w)


def test_every_way_to_declare_an_array_gives_the_same_pieces() -> None:
    x = torch.arange(32.0).reshape(4, 8)
    spec = (("dp",), ("tp",))
    ty = make_type((4, 8), torch.float32, spec, LAYOUT.sizes)
    ways = ["batch heads", Param("batch heads"), ty, PartitionSpec("dp", "tp")]
    shardings = {str(arrays_to_jax(x, LAYOUT, way).sharding) for way in ways}
    assert len(shardings) == 1


def test_refusals_name_the_leaf() -> None:
    x = torch.ones(4, 6)
    with pytest.raises(
        ShardingError, match=r"w\.up: declared 'ffn', which names 1 axes; the array"
    ):
        arrays_to_jax({"w": {"up": x}}, LAYOUT, {"w": {"up": "ffn"}})
    with pytest.raises(
        ShardingError, match=r"up: dim 1 \('ffn', size 6\) does not divide over mesh"
    ):
        arrays_to_jax({"up": x}, LAYOUT, {"up": "_ ffn"})
    with pytest.raises(ValueError, match=r"arrays_to_jax: a layout without axes\. Give axes="):
        arrays_to_jax({"up": x}, LAYOUT)


def test_the_mesh_has_ranks_in_row_major_order() -> None:
    mesh = jax_mesh(LAYOUT)
    assert mesh.axis_names == ("dp", "tp")
    assert [d.id for d in mesh.devices.flat] == list(range(8))
    refined = jax_mesh(Layout(Mesh(tp=4).refine(kv=2)))
    assert dict(refined.shape) == {"tp": 2, "tp.2": 2}


def test_rules_and_partition_specs_are_inverse() -> None:
    axes = {"wq": "heads embed", "w_up": "ffn embed", "norm": "embed", "scale": ""}
    rules = Rules(heads="tp", ffn=("tp", "dp"), embed=None)
    specs = rules_to_specs(rules, axes)
    assert specs == {
        "wq": PartitionSpec("tp", None),
        "w_up": PartitionSpec(("tp", "dp"), None),
        "norm": PartitionSpec(None),
        "scale": PartitionSpec(),
    }
    assert rules_from_specs(specs, axes) == rules


def test_specs_that_no_rules_give_are_refused() -> None:
    specs = {"a": PartitionSpec("tp", None), "b": PartitionSpec(None, "dp")}
    with pytest.raises(
        ShardingError, match=r"b: .* cuts 'x' over nothing, and a cuts it over \('tp'"
    ):
        rules_from_specs(specs, {"a": "x y", "b": "x z"})
    twice = re.escape("mesh axis 'tp' cuts dim 0 ('0') and dim 1 ('1')")
    with pytest.raises(ShardingError, match=twice):
        from_partition_spec(PartitionSpec("tp", "tp"), (4, 4), torch.float32, {"tp": 2})
