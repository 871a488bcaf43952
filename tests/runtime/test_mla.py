"""Multi-head latent attention on a mesh against one device, and against its formulas."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import megatree.functional as F
from megatree.functional.attention_kernels import choose_tile_kernel
from megatree.models.gpt import gpt
from megatree.models.gpt_config import GPTConfig
from megatree.parallel.context import AllGather, Hierarchical, Ring, Ulysses
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.order import Zigzag
from megatree.parallel.plan import plan
from tests.runtime.one_device import assert_like_one_device, reference
from tests.tolerances import assert_leaves_close

CFG = GPTConfig(
    vocab_size=50, vocab_pad=8, seq_length=8, num_layers=2, embed=16, kv_heads=4, head_dim=6,
    ffn=16, kv_rank=8, q_rank=12, rope_dim=4, value_dim=5,
    yarn=(4.0, 2.0, 0.5, 8.0, 0.7, 1.0),
)  # fmt: skip
DIRECT = replace(CFG, q_rank=None, yarn=None, window=3)
_TP: dict[str, Any] = {"kv_heads": "tp", "ffn": "tp", "vocab": "tp"}


def _cp(how: Any, **mesh: int) -> Layout:
    rules = Rules(batch="dp", seq="cp", seq_res="cp", lower={"attention": how})
    return Layout(Mesh(dp=2, cp=2), rules, order=Zigzag())


LAYOUTS: dict[str, Layout] = {
    "one rank": Layout(),
    "tp2": Layout(Mesh(tp=2), Rules(**_TP)),
    "tp4 sp": Layout(Mesh(tp=4), Rules(**_TP, seq_res="tp")),
    "dp2 tp2 sp": Layout(Mesh(dp=2, tp=2), Rules(batch="dp", seq_res="tp", **_TP)),
    "gathered": _cp(AllGather()),
    "ring": _cp(Ring()),
    "ulysses": _cp(Ulysses()),
    "hierarchical": Layout(
        Mesh(cp=4).refine(fast=2),
        Rules(seq="cp", seq_res="cp", lower={"attention": Hierarchical(Ulysses(), Ring())}),
        order=Zigzag(),
    ),
    "cp2 tp2 sp": Layout(
        Mesh(cp=2, tp=2),
        Rules(seq="cp", seq_res=("cp", "tp"), **_TP, lower={"attention": Ring()}),
        order=Zigzag(),
    ),
}
DEFAULT = {"one rank", "dp2 tp2 sp", "ulysses", "cp2 tp2 sp"}


@pytest.mark.parametrize(
    "name", [x if x in DEFAULT else pytest.param(x, marks=pytest.mark.full) for x in LAYOUTS]
)
def test_loss_and_gradients_are_those_of_one_device(name: str) -> None:
    assert_like_one_device(reference(CFG), LAYOUTS[name])


@pytest.mark.parametrize(
    "name", ["tp2", *(pytest.param(x, marks=pytest.mark.full) for x in ("ring", "ulysses"))]
)
def test_without_a_latent_of_queries_and_with_a_window(name: str) -> None:
    assert_like_one_device(reference(DIRECT), LAYOUTS[name])


def test_latents_are_what_is_gathered() -> None:
    """8 + 4 + 12 elements of a token travel, and not the 16 of the residual stream."""
    model = gpt(CFG, batch_size=8, dtype=torch.float64)
    unit = lower_model(model, LAYOUTS["tp4 sp"]).units["blocks.dense"]
    gathers = [c for c in unit.program.collectives
               if c.kind == "all_gather" and c.phase == "forward"]  # fmt: skip
    sizes = sorted(c.bytes // (8 * 8 * 8) for c in gathers)
    assert sizes == [4, 8, 12, 16]  # the last is the feed-forward layer's


@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_that_needs_equal_widths_gets_padded_values(causal: bool) -> None:
    """Values of 5 beside keys of 10: the same result and gradients as plain torch."""
    draw = torch.Generator().manual_seed(1)
    shapes = ((2, 6, 3, 1, 10), (2, 6, 3, 10), (2, 6, 3, 5))
    made = [torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes]
    out: dict[str, dict[str, Any]] = {}
    for kernel in ("reference", "cpu_flash"):
        leaves = [x.clone().requires_grad_() for x in made]
        o = F.attention(*leaves, causal=causal, scale=0.4, kernel=kernel)
        o.square().sum().backward()
        out[kernel] = {"o": o, **{name: x.grad for name, x in zip("qkv", leaves, strict=True)}}
    assert out["cpu_flash"]["o"].shape == (2, 6, 3, 1, 5)
    assert_leaves_close(out["cpu_flash"], out["reference"])
    note = choose_tile_kernel("cuda", torch.bfloat16, 192, 128, masked=False)
    assert str(note) == "flash (half precision without a mask, values padded from 128 to 192)"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"group": 2}, r"group is 2 with kv_rank 8, and latent attention has 1\. Take group=1\."),
        ({"rope_dim": 3}, r"rope_dim is 3, and rotary positions turn pairs\."),
        ({"value_dim": None}, r"value_dim is None with kv_rank 8\. Give at least 1\."),
        ({"kv_rank": None}, r"q_rank is 12 without kv_rank, .* Give kv_rank, or take q_rank=None"),
        ({"qk_norm": True}, r"qk_norm is True with kv_rank 8, .* Take qk_norm=False\."),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(CFG, **fields)


def test_flops_are_those_of_its_products() -> None:
    """2 FLOPs a parameter and token, and half of a square of keys of 10 and values of 5."""
    made = plan(gpt(CFG, batch_size=8, dtype=torch.float64), Layout())
    layers = 16 * 12 + 12 * 4 * 10 + 16 * (8 + 4) + 8 * 4 * (6 + 5) + 4 * 5 * 16 + 3 * 16 * 16
    attention = 4 * 8 * (10 + 5)  # 2 * 8 tokens * heads * widths / 2 for the causal half
    expected = 3 * (2 * (2 * layers + 16 * 56) + 2 * attention)
    assert made.flops_per_token == expected
