"""The gallery of errors: wrong programs and layouts, and what each is told, word for word.

A message names the place, the numbers and the smallest fix. `{here}` in a message is the line of
the program that ends with `# here`, `{made}` the one with `# made`.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import megatree as mt
import megatree.functional as F
from megatree.parallel.errors import ShardingError
from megatree.parallel.schedule import one_f_one_b
from megatree.parallel.threads import SimulationError

LAYOUT = mt.Layout(
    mt.Mesh(dp=2, tp=2), mt.Rules(batch="dp", ffn="tp", kv_heads="tp", vocab="tp")
)  # fmt: skip
SIZES = {"batch": 4, "seq": 6, "embed": 8, "ffn": 12, "kv_heads": 4, "head_dim": 2, "vocab": 10}
X = mt.Array("batch seq embed", grad=True)
MLP = {"up": mt.Param("ffn embed"), "down": mt.Param("ffn embed"), "bias": mt.Param("embed")}
CONSTANT = torch.ones(8)
GPT = mt.GPTConfig(
    vocab_size=10, seq_length=6, num_layers=2, embed=8, kv_heads=4, head_dim=2, ffn=12
)


@dataclass(frozen=True)
class Wrong:
    """A program that must be refused, and the message."""

    run: Callable[[], Any]
    message: str

    @property
    def expected(self) -> str:
        """The message, with the places in it."""
        lines, first = inspect.getsourcelines(self.run)
        places = {
            mark: f"parallel/{Path(__file__).name}:{first + at}"
            for at, line in enumerate(lines)
            for mark in ("here", "made")
            if line.rstrip().endswith(f"# {mark}")
        }
        return self.message.format(**places)


GALLERY: list[Wrong] = []


def refused(message: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Add a program to the gallery."""

    def add(run: Callable[[], Any]) -> Callable[[], Any]:
        GALLERY.append(Wrong(run, message))
        return run

    return add


def lower(fn: Callable[..., Any], *abstract: Any, layout: mt.Layout = LAYOUT, **sizes: int) -> None:
    mt.lower(fn, layout, *(abstract or (X,)), sizes={**SIZES, **sizes})


def hidden(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.relu(F.linear(x, w["up"]))


# -- sums that nobody finished ------------------------------------------------------------------


@refused(
    "{here}: softmax: operand 0 (float32[4/dp, 6, 8] P(tp)) is a pending sum over mesh axis "
    "'tp', and the op is not linear in it here. The sum was created at {made} (einsum 'b t "
    "f, f d -> b t d'). Insert shard(x, ...) between the two, so that the sum is finished."
)
def a_pending_sum_in_a_softmax() -> None:
    def fn(w: Any, x: Tensor) -> Tensor:
        y = F.einsum("b t f, f d -> b t d", hidden(w, x), w["down"])  # made
        return torch.softmax(y, -1)  # here

    lower(fn, MLP, X)


@refused(
    "{here}: add: operand 1 (float32[4/dp, 6, 8] P(tp)) is a pending sum over mesh axis "
    "'tp', and the op is not linear in it here. The sum was created at {made} (einsum 'b t "
    "f, f d -> b t d'). Insert shard(x, ...) between the two, so that the sum is finished."
)
def no_shard_before_a_residual_is_added() -> None:
    def fn(w: Any, x: Tensor) -> Tensor:
        y = F.einsum("b t f, f d -> b t d", hidden(w, x), w["down"])  # made
        return x + y  # here

    lower(fn, MLP, X)


@refused(
    "{here}: mul: operand 0 (float32[4/dp, 6, 8] P(tp)) is a pending sum over mesh axis "
    "'tp', and the op is not linear in it here. The sum was created at {made} (einsum 'b t "
    "f, f d -> b t d'). Insert shard(x, ...) between the two, so that the sum is finished."
)
def a_product_of_two_pending_sums() -> None:
    def fn(w: Any, x: Tensor) -> Tensor:
        y = F.einsum("b t f, f d -> b t d", hidden(w, x), w["down"])  # made
        return y * y  # here

    lower(fn, MLP, X)


@refused(
    "{here}: linear: the contracted dim of float32[4/dp, 6, 12/tp] is cut over ('tp',), so "
    "the product is a pending sum and the bias would be added once per rank. Add the bias "
    "after shard(product, ...)."
)
def a_bias_that_every_rank_would_add() -> None:
    def fn(w: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden(w, x), w["down"].t(), w["bias"])  # here

    lower(fn, MLP, X)


@refused(
    "{here}: div: operand 0 (float32[] P(dp)) is a pending sum over mesh axis 'dp', and the "
    "op is not linear in it here. The sum was created at {made} (sum). Insert shard(x, ...) "
    "between the two, so that the sum is finished."
)
def a_mean_over_the_tokens_of_one_rank() -> None:
    def fn(x: Tensor) -> Tensor:
        total = x.sum()  # made
        return total / torch.ones_like(x).sum()  # here

    lower(fn)


@refused(
    "blocks.mlp: the carry enters as float32[4/dp, 6, 8] and leaves as float32[4/dp, 6, 8] "
    "P(tp). End the block with shard(x, ...) over the axes it began with, in its dtype."
)
def a_carry_that_leaves_a_block_unfinished() -> None:
    def block(w: Any, x: Tensor, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        return F.einsum("b t f, f d -> b t d", hidden(w, x), w["down"]), {}

    mt.lower_model(chain(block=block), LAYOUT)


# -- cuts that do not fit -----------------------------------------------------------------------


@refused(
    "w: mesh axis 'tp' cuts dim 0 ('ffn') and dim 1 ('vocab'). Map one of the two to other "
    "mesh axes in rules."
)
def one_mesh_axis_for_two_dims() -> None:
    lower(lambda w, x: F.linear(x, w), mt.Param("ffn vocab"), mt.Array("batch vocab"))


@refused("rules: 'ffn' -> ('tp', 'tp') uses a mesh axis twice (tp tp). Name each mesh axis once.")
def one_mesh_axis_twice_in_a_rule() -> None:
    mt.Layout(mt.Mesh(tp=2), mt.Rules(ffn=("tp", "tp")))


@refused(
    "{here}: einsum 'b t f, g d -> b t f g d': mesh axis 'tp' cuts two dims of the op, 'f' "
    "and 'g' (float32[4/dp, 6, 12/tp], float32[12/tp, 8]). Map one of the two logical axes "
    "to other mesh axes in rules, or shard one operand first."
)
def one_mesh_axis_for_two_dims_of_a_product() -> None:
    def fn(h: Tensor, w: Tensor) -> Tensor:
        return F.einsum("b t f, g d -> b t f g d", h, w)  # here

    lower(fn, mt.Array("batch seq ffn"), MLP["down"])


@refused(
    "{here}: attention: dim 'g' is cut over ('tp',) in operand 0 (float32[4, 6, 4/tp, 2, 2]) "
    "and over nothing in operand 1 (float32[4, 6, 4, 2]). Lay both out alike with shard(x, "
    "...) or in rules."
)
def query_and_key_heads_cut_differently() -> None:
    def fn(q: Tensor, k: Tensor) -> Tensor:
        return F.attention(q, k, k, causal=True)  # here

    layout = mt.Layout(mt.Mesh(tp=2), mt.Rules(heads="tp"))
    q, k = mt.Array("batch seq heads group head_dim"), mt.Array("batch seq kv_heads head_dim")
    lower(fn, q, k, layout=layout, heads=4, group=2)


@refused(
    "{here}: mul: dim '2' is cut over ('tp',) in operand 0 (float32[4/dp, 6, 12/tp]) and "
    "over nothing in operand 1 (float32[12]). Lay both out alike with shard(x, ...) or in "
    "rules."
)
def operands_cut_differently() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * torch.arange(12.0)  # here

    lower(fn, mt.Array("batch seq ffn"))


@refused(
    "{here}: softmax: operand 0 (float32[4/dp, 6, 8]) is cut on dim 0 over ('dp',), and the "
    "op needs that dim whole. Insert shard(x, ...) with a whole axis there."
)
def a_softmax_along_a_cut_dim() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.softmax(x, 0)  # here

    lower(fn)


@refused(
    "{here}: flatten float32[6, 4/dp, 8] -> [24, 8]: dim 1 is cut over ('dp',) and merged "
    "behind another dim, so shards would interleave. Put the cut dim first in its group, or "
    "keep the dims apart."
)
def a_cut_dim_merged_behind_another() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(0, 1)  # here

    lower(fn)


@refused(
    "x: dim 0 ('batch', size 5) does not divide over mesh ('dp',) (size 2). Pad 'batch' to "
    "6, or map it to fewer mesh axes in rules."
)
def a_batch_that_does_not_divide() -> None:
    lower(lambda x: x * 2, batch=5)


@refused(
    "w.table: dim 0 ('vocab', size 11) does not divide over mesh ('tp',) (size 2). Pad "
    "'vocab' to 12, or map it to fewer mesh axes in rules."
)
def a_vocabulary_that_does_not_divide() -> None:
    mt.lower_model(mt.gpt(replace(GPT, vocab_size=11), batch_size=4), LAYOUT)


@refused("{here}: as_partial: float32[4/dp, 6, 8] is cut over 'dp'. shard(x, ...) it whole first.")
def a_value_that_is_cut_taken_for_a_sum() -> None:
    def fn(x: Tensor) -> Tensor:
        return mt.as_partial(x, "batch")  # here

    lower(fn)


@refused(
    "blocks.mlp: the carry enters as float32[4, 6, 8] and leaves as float32[4, 6/tp, 8]. End "
    "the block with shard(x, ...) over the axes it began with, in its dtype."
)
def a_block_that_changes_how_the_carry_is_cut() -> None:
    def block(w: Any, x: Tensor, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        return mt.shard(x * 2, "batch seq_res embed"), {}

    layout = mt.Layout(mt.Mesh(tp=2), mt.Rules(seq_res="tp"))
    mt.lower_model(chain(block=block), layout)


# -- names --------------------------------------------------------------------------------------


@refused(
    "input x: axis 'ffn' has size 8 here and size 12 at input w. Name the dims in their "
    "order; two different axes need two names."
)
def a_name_bound_to_two_sizes() -> None:
    lower(lambda w, x: F.linear(x, w), mt.Param("ffn embed"), mt.Array("seq ffn", shape=(6, 8)))


@refused(
    "{here}: shard 'seq batch embed': axis 'seq' has size 4 here and size 6 at input x. Name "
    "the dims in their order; two different axes need two names."
)
def names_in_another_order() -> None:
    def fn(x: Tensor) -> Tensor:
        return mt.shard(x, "seq batch embed")  # here

    lower(fn)


@refused(
    "{here}: shard 'batch seq': names 2 axes, the value has 3 dims (4, 6, 8). Give one name "
    "per dim."
)
def too_few_names() -> None:
    def fn(x: Tensor) -> Tensor:
        return mt.shard(x, "batch seq")  # here

    lower(fn)


@refused(
    "rules: nothing in the program has an axis 'bach' (did you mean 'batch'?). Remove the "
    "rule or use one of batch, embed, ffn, group, head_dim, kv_heads, seq, seq_res, vocab."
)
def a_rule_for_an_axis_that_nothing_has() -> None:
    mt.lower_model(mt.gpt(GPT, batch_size=4), mt.Layout(mt.Mesh(dp=2), mt.Rules(bach="dp")))


@refused(
    "rules: 'batch' -> ('data',): mesh axis 'data': the mesh has dp (and pp, dp, ep, cp, tp "
    "of size 1 where absent). Add it to the Mesh or rename it in Rules."
)
def a_rule_with_an_axis_that_the_mesh_lacks() -> None:
    mt.Layout(mt.Mesh(dp=2), mt.Rules(batch="data"))


@refused(
    "head: borrows 'embed.tabel', which the model does not have (did you mean "
    "'embed.table'?). Leaves are blocks.mlp.bias, blocks.mlp.down, blocks.mlp.up, "
    "embed.table."
)
def a_borrowed_leaf_that_does_not_exist() -> None:
    mt.lower_model(chain(borrows={"table": "embed.tabel"}), LAYOUT)


# -- what a trace cannot hold -------------------------------------------------------------------


@refused(
    "{here}: mul: a torch.autograd.Function is applied to a typed tensor (float32[4/dp, 6, 8]); "
    "its own backward would be lost. Declare the function that applies it with "
    '@op("...").'
)
def a_custom_autograd_function() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2  # here

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * 2

    lower(lambda x: Double.apply(x))


@refused(
    "{here}: mul: a context of autocast is active, which a lowered program does not keep. "
    "Cast with F.cast, or give parameters a dtype."
)
def autocast_inside() -> None:
    def fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x * 2  # here

    lower(fn)


@refused(
    "{here}: mul: a context of no_grad is active, which a lowered program does not keep. Use "
    "F.stop_gradient on the value."
)
def no_grad_inside() -> None:
    def fn(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x * 2  # here

    lower(fn)


@refused(
    "{here}: mul: a context of sdpa_kernel is active, which a lowered program does not keep. "
    "Choose the kernel with F.attention(..., kernel=...)."
)
def a_choice_of_kernel_inside() -> None:
    def fn(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return x * 2  # here

    lower(fn)


@refused(
    "{here}: add: mixes a plain tensor [8] with a typed one (float32[4/dp, 6, 8]); whether "
    "it is whole or a shard cannot be known. Pass it as an input, or make it inside the "
    "function (torch.arange, torch.tensor)."
)
def a_tensor_from_outside() -> None:
    def fn(x: Tensor) -> Tensor:
        return x + CONSTANT  # here

    lower(fn)


@refused(
    "{here}: randn draws from torch's random state, which differs by rank and mesh. Use "
    "F.dropout with a key, or megatree.functional.keys."
)
def a_constant_that_depends_on_the_rank() -> None:
    def fn(x: Tensor) -> Tensor:
        return x + torch.randn(8)  # here

    lower(fn)


@refused(
    "{here}: __setitem__: an in-place write to a typed tensor (float32[4/dp, 6, 8]). Write "
    "the out-of-place form (x = x + y, torch.where)."
)
def an_in_place_write() -> None:
    def fn(x: Tensor) -> Tensor:
        x[0] = 1.0  # here
        return x

    lower(fn)


@refused(
    "{here}: bool: a value (bool[]) flows into Python here, where every rank has only its "
    "part. Use torch.where or a mask; data-dependent code belongs in a local_map."
)
def a_branch_on_data() -> None:
    def fn(x: Tensor) -> Tensor:
        return x if mt.shard(x.sum(), "") > 0 else -x  # here

    lower(fn)


@refused(
    "{here}: item: a value (float32[] P(dp)) flows into Python here, where every rank has "
    "only its part. Use torch.where or a mask; data-dependent code belongs in a local_map."
)
def a_number_taken_from_data() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * x.sum().item()  # here

    lower(fn)


@refused(
    "{here}: indexing float32[4/dp, 6, 8] with a tensor or list has no sharding rule. Use "
    "F.embedding, torch.where or a local_map."
)
def a_shape_that_depends_on_data() -> None:
    def fn(x: Tensor) -> Tensor:
        return x[x > 0]  # here

    lower(fn)


@refused(
    "{here}: no sharding rule for nonzero (operands float32[4/dp, 6, 8]). Declare it with "
    '@op("..."), write it with the vocabulary, or wrap the code in local_map.'
)
def an_op_without_a_rule() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.nonzero()  # here

    lower(fn)


@refused(
    "{here}: to: moves a typed tensor (float32[4/dp, 6, 8]) to a device. Lowered programs "
    "run on the rank's device; drop the device argument."
)
def a_move_to_a_device() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.to("cuda")  # here

    lower(fn)


@refused(
    "{here}: mul.default: a torch.func transform (grad, vmap, jvp) is applied to a typed "
    "tensor (float32[4/dp, 6, 8]). Apply it to what is lowered, or inside an op or a "
    "local_map."
)
def a_gradient_inside() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: (y * y).sum())(x)  # here

    lower(fn)


@refused(
    "{here}: mul: a typed tensor is used outside the trace it belongs to (a body that closes "
    "over it, or code after the trace). Pass it as an operand."
)
def a_value_kept_after_its_trace() -> None:
    kept: list[Tensor] = []
    lower(lambda x: (kept.append(x), x)[1])
    kept[0] * 2  # here


# -- ops and bodies of one's own ----------------------------------------------------------------


@refused(
    "{here}: <lambda>: '... d, d -> ... d': takes 2 operands, 1 given. Give one operand per "
    "group of labels."
)
def a_call_with_too_few_operands() -> None:
    scale = mt.op("... d, d -> ... d")(lambda x: x)

    def fn(x: Tensor) -> Tensor:
        return scale(x)  # here

    lower(fn)


@refused(
    "rulecheck: the rule or the op's local form is wrong: with operands (float32[4, 6/a]) "
    "the result 0 is off by 0.224 (relative L2). Mark a dim that the function looks along "
    "with ! in the signature, one that it sums with +."
)
def a_signature_that_is_wrong() -> None:
    mt.rulecheck(mt.op("... d -> ... d")(lambda x: x.flip(-1)), torch.arange(24.0).view(4, 6))


@refused(
    "{here}: local_map body: output 0 ('_ seq embed') does not say what it is over mesh axis "
    "'dp', on which an input or another output varies. Name the logical axis in the output's "
    "dims, in Out(partial=...) or in Out(replicated=...)."
)
def a_body_that_does_not_say_what_it_returns() -> None:
    def body(comm: Any, x: Tensor) -> Tensor:
        return x

    mapped = mt.local_map(body, in_axes=["batch seq embed"], out_axes="_ seq embed")

    def fn(x: Tensor) -> Tensor:
        return mapped(x)  # here

    lower(fn)


@refused(
    "{here}: local_map body: operand 0 is float32[4/dp, 6, 12], declared 'batch seq ffn' = "
    "(('dp',), (), ('tp',)). shard(x, 'batch seq ffn') it first."
)
def a_body_that_takes_another_cut() -> None:
    def body(comm: Any, x: Tensor) -> Tensor:
        return x

    mapped = mt.local_map(body, in_axes=["batch seq ffn"], out_axes="batch seq ffn")

    def fn(x: Tensor) -> Tensor:
        return mapped(x)  # here

    lower(fn, mt.Array("batch seq wide"), wide=12)


@refused(
    "{here}: local_map body: the body failed at local shapes [[2, 6, 8]]: comm: 'heads' is "
    "not an axis of this body (it has batch, embed, seq). Name it in in_axes, out_axes or "
    "over. Fix the body, or declare static=False if its shapes depend on data."
)
def a_collective_over_an_axis_that_a_body_lacks() -> None:
    def body(comm: Any, x: Tensor) -> Tensor:
        return comm.psum(x, "heads")

    mapped = mt.local_map(body, in_axes=["batch seq embed"], out_axes="batch seq embed")

    def fn(x: Tensor) -> Tensor:
        return mapped(x)  # here

    lower(fn)


@refused(
    "{here}: shard inside a local_map body, where values are local and it would do nothing. "
    "Use comm's collectives, or annotate outside the body."
)
def a_shard_inside_a_body() -> None:
    def body(comm: Any, x: Tensor) -> Tensor:
        return mt.shard(x, "batch seq embed")  # here

    mapped = mt.local_map(body, in_axes=["batch seq embed"], out_axes="batch seq embed")
    lower(lambda x: mapped(x))


def simulated(body: Callable[..., Any]) -> None:
    """Run a body whose result is said to be the same on both ranks."""
    out = mt.Out("_", replicated=("batch",))
    mapped = mt.local_map(body, in_axes=["batch"], out_axes=out)
    layout = mt.Layout(mt.Mesh(dp=2), mt.Rules(batch="dp"))
    mt.simulate(lambda x: mt.shard(mapped(x), "one"), layout, torch.arange(4.0), axes=("batch",))


@refused(
    "result 0: float32[2] should be the same over ['dp'], but the copy at (1,) differs from "
    "the first by 2.83 of 1. Make it the same in the body (psum, all_gather), or declare it "
    "cut or partial there."
)
def a_body_whose_results_differ_by_rank() -> None:
    simulated(lambda comm, x: x)


@refused(
    "deadlock: rank 0 waits in psum(dp), call 1; ranks [1] have finished. Make the same "
    "collectives on every rank: mask a value, never branch around one."
)
def a_collective_on_one_rank_alone() -> None:
    simulated(lambda comm, x: comm.psum(x, "batch") if comm.axis_index("batch") == 0 else x)


# -- models, meshes, pipelines ------------------------------------------------------------------


def block(w: Any, x: Tensor, consts: Any, cfg: Any, *, state: Any = None) -> Any:
    y = F.einsum("b t f, f d -> b t d", hidden(w, x), w["down"])
    return x + mt.shard(y, "batch seq embed"), {}


def embed(w: Any, carry: None, consts: Any, cfg: Any, *, state: Any = None) -> Any:
    return mt.shard(F.embedding(consts["tokens"], w["table"]), "batch seq embed"), {}


def head(w: Any, x: Tensor, consts: Any, cfg: Any, *, state: Any = None) -> Any:
    losses = F.cross_entropy(F.linear(x, w["table"]), consts["tokens"])
    return None, {"terms": {"loss": (losses.sum(), torch.ones_like(losses).sum())}}


def chain(block: Any = block, head: Any = head, borrows: Any = None) -> mt.Chain:
    return mt.Chain(
        segments={
            "embed": mt.Segment(apply=embed, params={"table": mt.Param("vocab embed")}),
            "blocks": mt.Stack(
                kinds={"mlp": mt.Segment(apply=block, params=MLP)}, pattern=("mlp", "mlp")
            ),
            "head": mt.Segment(apply=head, borrows=borrows or {"table": "embed.table"}),
        },
        cfg=None,
        sizes=SIZES,
        batch={"tokens": mt.Array("batch seq", torch.int64)},
    )


@refused(
    "head: term 'loss' is float32[4/dp, 6], float32[] P(dp). A term is a pair (sum, weight) "
    "of scalars. Sum both over the batch: (loss.sum(), weight.sum())."
)
def a_loss_of_many_numbers() -> None:
    def many(w: Any, x: Tensor, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        losses = F.cross_entropy(F.linear(x, w["table"]), consts["tokens"])
        return None, {"terms": {"loss": (losses, torch.ones_like(losses).sum())}}

    mt.lower_model(chain(head=many), LAYOUT)


@refused(
    "head: the weight of a loss term depends on 'w.table'. Compute weights from the batch "
    "only; the step needs them before any backward."
)
def a_weight_that_depends_on_parameters() -> None:
    def learned(w: Any, x: Tensor, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        losses = F.cross_entropy(F.linear(x, w["table"]), consts["tokens"])
        return None, {"terms": {"loss": (losses.sum(), (losses > 1).float().sum())}}

    mt.lower_model(chain(head=learned), LAYOUT)


@refused(
    "refine(kv=3): no block of 3 inner ranks divides the axes {{'dp': 2, 'tp': 4}} (pp "
    "excluded). Choose a size that divides them."
)
def a_mesh_that_cannot_be_refined() -> None:
    mt.Mesh(dp=2, tp=4).refine(kv=3)


@refused(
    "layout: the mesh has pp=2 and no schedule. Give one, for example Layout(mesh, rules, "
    "schedule=one_f_one_b)."
)
def a_pipeline_without_a_schedule() -> None:
    mt.Layout(mt.Mesh(pp=2))


@refused(
    "rules: 'embed' -> ('pp',): stages are placed, not cut. Take pp out of the rule and give "
    "a Placement."
)
def a_rule_over_the_pipeline() -> None:
    mt.Layout(mt.Mesh(pp=2), mt.Rules(embed="pp"), schedule=one_f_one_b)


@refused(
    "schedule: is for 2 ranks and 4 microbatches, the mesh has pp=2 and the step 8. Give a "
    "schedule of that size.\n  rank 0 |  F0.0   F0.1   B0.0   F0.2   B0.1   F0.3   B0.2   "
    "B0.3  [?]\n  rank 1 |  F1.0   B1.0   F1.1   B1.1   F1.2   B1.2   F1.3   B1.3  [?]"
)
def a_schedule_of_another_size() -> None:
    mt.Layout(mt.Mesh(pp=2), schedule=one_f_one_b(2, 4)).schedule_for(8)


@pytest.mark.parametrize("wrong", GALLERY, ids=lambda wrong: wrong.run.__name__)
def test_a_wrong_program_is_told_what_to_do(wrong: Wrong) -> None:
    with pytest.raises((ShardingError, SimulationError)) as caught:
        wrong.run()
    assert str(caught.value) == wrong.expected


def test_every_message_has_a_place_and_a_fix() -> None:
    """`<place>: <what is wrong, with the numbers>. <smallest fix>.`"""
    assert len(GALLERY) >= 25
    for wrong in GALLERY:
        place, _, rest = wrong.message.splitlines()[0].partition(": ")
        assert place, wrong.message
        assert re.search(r"\. (?:[A-Z]\w*|shard\()[^.].*\.$", rest), wrong.message
