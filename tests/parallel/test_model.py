"""Lowering whole models: what is refused, and what once went wrong between segments."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatree.functional.annotate import shard
from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Param, init
from megatree.models.gpt import GPTConfig, block, gpt
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from tests.runtime.one_device import assert_like_one_device, differentiate, reference
from tests.runtime.table import MODELS

SMALL = GPTConfig(
    vocab_size=16, seq_length=4, num_layers=1, embed=8, kv_heads=2, head_dim=4, ffn=8
)  # fmt: skip


def with_segment(name: str, segment: Segment) -> Chain:
    model = gpt(SMALL, batch_size=2)
    return replace(model, segments={**model.segments, name: segment})


def with_block(apply) -> Chain:
    model = gpt(SMALL, batch_size=2)
    stack: Any = model.segments["blocks"]
    kinds = {"dense": replace(stack.kinds["dense"], apply=apply)}
    return replace(model, segments={**model.segments, "blocks": replace(stack, kinds=kinds)})


def loss_of(terms):
    return Segment(
        apply=lambda w, carry, consts, cfg, *, state=None: (None, {"terms": terms(carry, consts)})
    )


@pytest.mark.parametrize(
    ("model", "rules", "text"),
    [
        (
            gpt(SMALL, batch_size=2),
            Rules(vocabulary="tp"),
            r"rules: nothing in the program has an axis 'vocabulary' \(did you mean 'vocab'\?\)",
        ),
        (
            gpt(SMALL, batch_size=2),
            Rules(kv_heads=("tp", "dp")),
            r"blocks\.dense\.wq|w\.\w+: dim 0 \('kv_heads', size 2\) does not divide over mesh "
            r"\('tp', 'dp'\) \(size 4\)\. Pad 'kv_heads' to 4",
        ),
        (
            with_block(
                lambda w, x, consts, cfg, *, state=None: (
                    x.sum(0, keepdim=True).expand(2, 4, 8),
                    {},
                )
            ),
            Rules(batch="dp"),
            r"blocks\.dense: the carry  ?enters as float32\[2/dp, 4, 8\] and leaves as "
            r"float32\[2, 4, 8\] P\(dp\)\. End the block with shard\(x, \.\.\.\) over the axes it "
            r"began "
            r"with, in its dtype\.",
        ),
        (
            with_block(lambda w, x, consts, cfg, *, state=None: ((x, x), {})),
            Rules(),
            r"blocks\.dense: the carry enters as .* and leaves as .*\. Return a carry of the "
            r"structure it came with\.",
        ),
        (
            with_block(lambda w, x, consts, cfg, *, state=None: (x.double(), {})),
            Rules(),
            r"blocks\.dense: the carry  ?enters as float32\[2, 4, 8\] and leaves as float64\[2, 4, "
            r"8\]",
        ),
        (
            with_segment("loss", loss_of(lambda x, consts: {"loss": (x.sum(), x.mean())})),
            Rules(),
            r"loss: the weight of a loss term depends on 'carry'\. Compute weights from the batch "
            r"only; the step needs them before any backward\.",
        ),
        (
            with_segment(
                "loss", loss_of(lambda x, consts: {"loss": (x.sum(1), consts["weights"].sum())})
            ),
            Rules(),
            r"loss: term 'loss' is float32\[2, 16\], float32\[\]\. A term is a pair \(sum, "
            r"weight\) of "
            r"scalars\.",
        ),
        (
            with_segment("loss", loss_of(lambda x, consts: {"loss": (x.sum(),)})),
            Rules(),
            r"loss: term 'loss' is float32\[\]\. A term is a pair \(sum, weight\) of scalars\.",
        ),
        (
            with_segment(
                "loss",
                loss_of(lambda x, consts: {"loss": (consts["weights"].sum(),) * 2}),
            ),
            Rules(),
            r"loss: term 'loss' does not depend on any parameter, so it has no gradient\. "
            r"Return it as a metric, beside terms\.",
        ),
        (
            with_segment("head", Segment(apply=block, borrows={"table": "embed.tables"})),
            Rules(),
            r"head: borrows 'embed\.tables', which the model does not have \(did you mean "
            r"'embed\.table'\?\)\. Leaves are blocks\.dense\.norm1, ",
        ),
    ],
)
def test_a_model_that_cannot_be_lowered_says_why(model: Chain, rules: Rules, text: str) -> None:
    with pytest.raises(ShardingError, match=text):
        lower_model(model, Layout(Mesh(dp=2, tp=2), rules))


def test_a_swapped_name_is_seen_although_the_block_is_consistent() -> None:
    """Within one block "seq batch" everywhere contradicts nothing but the model's sizes."""

    def swapped(w, carry, consts, cfg, *, state=None):
        return shard(carry, "seq batch embed"), {}

    with pytest.raises(
        ShardingError, match=r"axis 'seq' has size 2 here and size 4 at the model's sizes\."
    ):
        lower_model(with_block(swapped), Layout(Mesh(dp=2), Rules(batch="dp")))


def test_a_carry_that_takes_its_first_gradient_inside_a_stack() -> None:
    """The first layer's carry has none, the others' has: lowered without, layer 2 cut it off."""

    def constant(w, carry, consts, cfg, *, state=None):
        return consts["weights"].double().unsqueeze(-1).expand(2, 4, 8) * 0.1, {}

    def layer(w, carry, consts, cfg, *, state=None):
        return torch.tanh(torch.einsum("btd,de->bte", carry + 0.1, w["w_up"])), {}

    def loss(w, carry, consts, cfg, *, state=None):
        return None, {"terms": {"loss": (carry.sum(), consts["weights"].sum())}}

    model = gpt(replace(SMALL, num_layers=3), batch_size=2, dtype=torch.float64)
    kinds = {"dense": Segment(apply=layer, params={"w_up": Param("embed width")})}
    stack = Stack(kinds=kinds, pattern=("dense",) * 3)
    model = replace(
        model,
        segments={"embed": Segment(apply=constant), "blocks": stack, "loss": Segment(apply=loss)},
        sizes={**model.sizes, "width": 8},
    )
    draw = torch.Generator().manual_seed(0)
    params = {
        "blocks": {"dense": {"w_up": torch.randn(3, 8, 8, dtype=torch.float64, generator=draw)}}
    }
    batch = {
        "tokens": torch.zeros(2, 4, dtype=torch.int64),
        "labels": torch.zeros(2, 4, dtype=torch.int64),
        "weights": torch.rand(2, 4, generator=draw),
    }
    value, grads = differentiate(model, params, [batch])
    ref = replace(
        reference(MODELS["llama"]),
        model=model,
        params=params,
        batches=(batch,),
        loss=value,
        grads=grads,
    )
    assert_like_one_device(ref, Layout(Mesh(dp=2), Rules(batch="dp")))


def test_leaves_in_a_long_list_keep_their_order() -> None:
    """Sorted by name, "rows.10" came before "rows.2": weights changed places silently."""

    def head(w, carry, consts, cfg, *, state=None):
        scale = sum((1 + i) * row for i, row in enumerate(w["rows"]))
        return carry * scale, {}

    model = gpt(SMALL, batch_size=2, dtype=torch.float64)
    head_segment = Segment(apply=head, params={"rows": [Param("embed") for _ in range(12)]})
    loss = loss_of(lambda x, consts: {"loss": (x.square().sum(), consts["weights"].sum())})
    model = replace(model, segments={**model.segments, "head": head_segment, "loss": loss})
    params = init(model.params, model.sizes, 0, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    batch = {
        "tokens": torch.randint(16, (2, 4), generator=draw),
        "labels": torch.randint(16, (2, 4), generator=draw),
        "weights": torch.ones(2, 4),
    }
    value, grads = differentiate(model, params, [batch])
    ref = replace(
        reference(MODELS["llama"]),
        model=model,
        params=params,
        batches=(batch,),
        loss=value,
        grads=grads,
    )
    assert_like_one_device(ref, Layout(Mesh(dp=2), Rules(batch="dp")))
    assert re.fullmatch(r"head\.rows\.\d+", list(grads)[-1])
