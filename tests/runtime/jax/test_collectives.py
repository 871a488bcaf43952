"""The collectives that XLA chose: read from its program, and laid beside ours."""

import re

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.lower import lower
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.program import Collective
from megatree.parallel.types import ShardType
from megatree.runtime.jax.collectives import against_jax, collectives_of, counts, parse

SIZES = {"dp": 2, "tp": 4}
PROGRAM = """\
HloModule jit_both

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %b = f32[] parameter(1)
  ROOT %m = f32[] maximum(%a, %b)
}

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main {
  CALLS
  %t = f32[4]{0} fusion(%all-reduce.1), calls=%not_a_collective
}
"""
# What a call is, how it spells its groups, and what follows.
CALLS = [
    ("f32[4,8]{1,0} all-reduce(%x)", "{{0,1,2,3},{4,5,6,7}}", "to_apply=%add.1",
     "jit(f)/jvp(models/gpt.py:12)/dot_general"),
    ("f32[4]{0} all-reduce(%x)", "[2,4]<=[8]", "to_apply=%region_0.1", "jvp(models/gpt.py:13)/max"),
    ("bf16[16,8]{1,0} all-gather(%y)", "[4,2]<=[2,4]T(1,0)", "dimensions={0}",
     "jit(f)/transpose(jvp(my.py:7))/mul"),
    ("f64[2]{0} reduce-scatter(%y)", "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "to_apply=%add.1",
     ""),
    ("(s64[2]{0}, s64[2]{0}) all-to-all(%y, %z)",
     "mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", "", "jit(f)/my.py:9/mul"),
    ("pred[8]{0} all-gather-start(%y)", "mesh['axis_0'=8] {'axis_0':(2)2}", "dimensions={0}", ""),
    ("f32[8]{0} all-reduce(%y)", "{{0,1,2,3,4,5,6,7}}", "to_apply=%add.1", ""),
]  # fmt: skip
PERMUTE = "  %p = f32[8]{0} collective-permute(%y), source_target_pairs={{0,4},{1,5}}"


def hlo() -> str:
    """Return a program of XLA with these calls."""
    lines = [
        f'  %v = {call}, replica_groups={groups}, {more}, metadata={{op_name="{name}" id=2}}'
        for call, groups, more, name in CALLS
    ]
    return PROGRAM.replace("  CALLS", "\n".join([*lines, PERMUTE]))


def test_a_program_of_xla_is_read() -> None:
    """Every spelling of groups that XLA was seen to use, and who asked for the collective."""
    assert parse(hlo(), SIZES) == [
        Collective("models/gpt.py:12", "psum", ("tp",), 128, "forward"),
        Collective("models/gpt.py:13", "pmax", ("tp",), 16, "forward"),
        Collective("my.py:7", "all_gather", ("dp",), 256, "backward"),
        Collective("?", "psum_scatter", ("tp",), 64, "forward"),
        Collective("my.py:9", "all_to_all", ("dp",), 32, "forward"),
        Collective("?", "all_gather", ("tp",), 8, "forward"),
        Collective("?", "psum", ("dp", "tp"), 32, "forward"),
        Collective("?", "ppermute", ("dp",), 32, "forward"),
    ]


def mlp(w: dict[str, Tensor], x: Tensor) -> Tensor:
    h = torch.tanh(F.linear(x, w["up"]))
    return shard(F.einsum("b f, f d -> b d", h, w["down"]), "batch embed")


def test_xla_and_we_agree_on_a_tensor_parallel_layer() -> None:
    """One sum over tp forward, one backward, and the weights' sums over dp."""
    layout = Layout(Mesh(**SIZES), Rules(batch="dp", ffn="tp"))

    def typed(*shape: int, spec: tuple[tuple[str, ...], ...]) -> ShardType:
        used = {axis for axes in spec for axis in axes}
        kinds = tuple((axis, "I") for axis in SIZES if axis not in used)
        return ShardType(shape, torch.float32, spec, kinds, grad=True)

    w = {"up": typed(16, 8, spec=(("tp",), ())), "down": typed(16, 8, spec=(("tp",), ()))}
    x = typed(4, 8, spec=(("dp",), ()))
    program = lower(mlp, layout, w, x)
    theirs = collectives_of(mlp, layout, (w, x), program.out_types)
    assert counts(theirs) == {"psum": 4}
    ours = [c for c in program.collectives if c.phase != "sync"]
    for phase in ("forward", "backward"):
        over_tp = [(c.kind, c.bytes) for c in theirs if c.axes == ("tp",) and c.phase == phase]
        assert over_tp == [
            (c.kind, c.bytes) for c in ours if c.axes == ("tp",) and c.phase == phase
        ]
    assert [c.source for c in theirs if c.phase == "forward"] == [ours[0].source]


@pytest.mark.full  # `megatree explain --against-jax` prints the same in the default suite
def test_a_model_is_printed_beside_ours() -> None:
    cfg = GPTConfig(
        vocab_size=16, seq_length=8, num_layers=1, embed=16, kv_heads=2, head_dim=8, ffn=32
    )
    layout = Layout(
        Mesh(dp=2, tp=2), Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
    )
    program = lower_model(gpt(cfg, batch_size=4), layout)
    text = against_jax(program, "blocks.dense")
    first, forward, backward, *lines = text.splitlines()
    assert first == "blocks.dense on dp=2 tp=2: megatree | XLA"
    assert forward.startswith("  forward   2 all_gather(tp) + 2 psum_scatter(tp) [4 KiB] | ")
    assert re.match(r"  backward  2 all_gather\(tp\) \+ .*psum\(dp\).* \| .*psum\(dp\)", backward)
    assert all(re.match(r"    (models/gpt\.py:\d+|\?) +.* \| .*", line) for line in lines)
    assert any("psum_scatter(tp) | " in line for line in lines)


def test_too_few_devices_are_refused() -> None:
    layout = Layout(Mesh(dp=16), Rules(batch="dp"))
    ty = ShardType((16,), torch.float32, (("dp",),), (), grad=True)
    with pytest.raises(
        ShardingError, match=r"16 ranks, JAX has 8 devices\. Give more, or on a CPU"
    ):
        collectives_of(lambda x: x * 2, layout, (ty,), (ty,))
