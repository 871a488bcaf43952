"""The central table: loss and all gradients of a step equal one device's, on any mesh, by any rules."""

import itertools
import re
from dataclasses import replace
from functools import lru_cache

import optree
import pytest
import torch

from megatree.functional.chain import Chain, Segment
from megatree.functional.param import Array, Param, init
from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import GPTConfig, block, gpt
from megatree.parallel.assemble import points
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules, cut
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.program import Program
from megatree.parallel.threads import Threads
from megatree.runtime.gradients import value_and_grad
from megatree.runtime.packing import pack
from tests.parallel import worlds
from tests.runtime.one_device import (
    MICROBATCHES,
    Compared,
    assert_like_one_device,
    differentiate,
    rank_inputs,
    reference,
)
from tests.runtime.table import DEFAULT, MODELS, layouts, rows
from tests.tolerances import distance

TABLE = [
    pytest.param(model, name, id=f"{model} on {name}", marks=() if quick else pytest.mark.full)
    for model, name, quick in rows()
]


@pytest.mark.parametrize(("model", "name"), TABLE)
def test_the_central_table(model: str, name: str) -> None:
    """Float64, two microbatches of unequal weight: forward parity would not see most of what this sees."""
    compared = assert_like_one_device(reference(MODELS[model]), layouts(model)[name])
    assert dict(compared.counts) == expected_counts(compared)


def expected_counts(compared: Compared) -> dict[str, int]:
    """Return the collectives that the plan says a rank executes in a step."""
    program = compared.program
    counts: dict[str, int] = {}

    def add(kind: str, times: int) -> None:
        if times:
            counts[kind] = counts.get(kind, 0) + times

    for name, _, _ in program.order:
        for phase in ("forward", "backward"):
            for kind, times in program.units[name].program.counts(phase).items():
                add(kind, times * MICROBATCHES)
    for kind, times in program.consts.counts("forward").items():
        add(kind, times * MICROBATCHES)
    add("psum", sum(group.num_rows for group in pack(program) if group.sync))
    terms = program.units["loss"].program
    add("psum", sum(bool(terms.out_types[at].axes_in("P")) for at in (0, 1)))
    return counts


def test_the_default_rows_cover_every_layout() -> None:
    names = {name for model in MODELS for name in layouts(model)}
    assert {name for quick in DEFAULT.values() for name in quick} == names
    assert set(DEFAULT) == set(MODELS)
    assert len(names) >= 28
    assert max(layout.mesh.num_ranks for m in MODELS for layout in layouts(m).values()) == 8


# -- collectives of a block ---------------------------------------------------------------------

BLOCK = {
    "dp2": ({}, {}),
    "tp2": ({"psum": 2}, {"psum": 2}),
    "dp2 tp2": ({"psum": 2}, {"psum": 2}),
    "tp2 sp": ({"all_gather": 2, "psum_scatter": 2}, {"all_gather": 2, "psum_scatter": 2}),
    "dp2 tp4 sp": ({"all_gather": 2, "psum_scatter": 2}, {"all_gather": 2, "psum_scatter": 2}),
    "tp over two, swapped": ({"all_gather": 2, "psum_scatter": 2}, {"all_gather": 2, "psum_scatter": 2}),
    "attention alone": ({"all_gather": 2, "psum_scatter": 1}, {"all_gather": 2, "psum_scatter": 1}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name"),
    [(m, name) for m, name in itertools.product(MODELS, BLOCK) if name in layouts(m)],
)
def test_collectives_of_a_block(model: str, name: str) -> None:
    """Megatron's counts, and nothing else: all sums of gradients of leaves are hoisted."""
    program = block_program(model, name)
    assert (program.counts("forward"), program.counts("backward")) == BLOCK[name]


@pytest.mark.parametrize("name", layouts("few kv"))
def test_heads_that_are_cut_two_ways_cost_nothing_more(name: str) -> None:
    """Keys that all ranks share beside queries that they cut: one sum for both."""
    program = block_program("few kv", name)
    kinds = BLOCK["tp2 sp" if "sp" in name or name == "group alone" else "tp2"]
    assert (program.counts("forward"), program.counts("backward")) == kinds


@lru_cache
def block_program(model: str, name: str) -> Program:
    return lower_model(reference(MODELS[model]).model, layouts(model)[name]).units["blocks.dense"].program


def test_what_is_synchronised_once_per_step() -> None:
    program = lower_model(reference(MODELS["llama"]).model, layouts("llama")["dp2 tp2 sp"])
    leaves = {path: axes for path, axes in program.sync.items() if path.startswith("blocks")}
    norms = {path for path in leaves if "norm" in path}
    assert norms == {"blocks.dense.norm1", "blocks.dense.norm2"}
    assert {leaves[path] for path in norms} == {("dp", "tp")}
    assert {axes for path, axes in leaves.items() if path not in norms} == {("dp",)}
    sync = program.units["blocks.dense"].program.counts("sync")
    assert sync == {"psum": len(leaves)}


# -- the gradient of the carry ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama", "dp2 tp2 sp"),
        ("llama", "mixed"),
        ("gpt2 dropout", "tp2 sp"),
        ("mqa", "dp2 tp2"),
        ("few kv", "refined sp"),
    ],
)
def test_a_block_passes_the_gradient_of_its_carry(model: str, name: str) -> None:
    """Section 7: a carry whose cotangent stays P. The table sees it only through earlier leaves."""
    ref, cfg = reference(MODELS[model]), MODELS[model]
    weights = {key: leaf[0] for key, leaf in ref.params["blocks"]["dense"].items()}
    declared = {
        key: replace(leaf, axes=leaf.axes.removeprefix("layers "), stack=None)
        for key, leaf in ref.model.params["blocks"]["dense"].items()
    }
    consts = ref.model.consts(ref.batches[0], cfg) | {"layer": torch.tensor(1)}
    consts = {name: consts[name] for name in CONSTS if name in consts}
    carry = torch.randn(8, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    worlds.assert_like_one_device(
        lambda w, x, consts: block(w, x, consts, cfg)[0],
        layouts(model)[name],
        (weights, carry, consts),
        (declared, "batch seq_res embed", {name: CONSTS[name] for name in consts}),
    )


CONSTS = {
    "rope": Array("_ _", grad=False), "key": Array("", torch.int64), "layer": Array("", torch.int64),
}  # fmt: skip


# -- rows of section 7, each alone --------------------------------------------------------------


def rank_values(layout: Layout, ref, batches=None):
    program = lower_model(ref.model, layout)

    def rank_main(comm):
        params, mine = rank_inputs(ref, program, comm)
        return value_and_grad(ref.model, layout, comm=comm)(params, batches or mine)

    return Threads(layout.sizes).run(rank_main)


def test_a_step_in_which_every_token_is_masked_is_refused() -> None:
    ref = reference(MODELS["llama"])
    masked = replace_batches(ref, lambda batch: {**batch, "weights": torch.zeros_like(batch["weights"])})
    text = (
        r"step: loss terms \['loss'\] have no weight in any of 2 microbatches \(every token is masked\)\. "
        r"Give the step a batch with at least one token that counts\."
    )
    for name in ("one rank", "dp2 tp2"):
        with pytest.raises(ValueError, match=text):
            rank_values(layouts("llama")[name], masked)


def replace_batches(ref, change):
    return replace(ref, batches=tuple(map(change, ref.batches)))


def test_a_rank_and_a_microbatch_without_tokens_are_fine() -> None:
    """The weight is that of the whole step: a local or per-microbatch count would be 0/0."""
    ref = reference(MODELS["llama"])

    def change(batch):
        weights = torch.zeros_like(batch["weights"])
        if batch is ref.batches[1]:
            weights[0, 2:5] = 1.0  # the first rank's rows alone
        return {**batch, "weights": weights}

    masked = replace_batches(ref, change)
    loss, grads = differentiate(ref.model, ref.params, masked.batches)
    assert_like_one_device(replace(masked, loss=loss, grads=grads), layouts("llama")["dp2 tp2 sp"])


def test_the_loss_is_divided_by_the_weight_of_the_whole_step() -> None:
    """The mean over ranks and microbatches of their own means is another number here."""
    ref = reference(MODELS["llama"])
    parts = [differentiate(ref.model, ref.params, [batch])[0] for batch in ref.batches]
    assert distance(sum(parts) / 2, ref.loss) > 1e-3
    (values, _), *_ = rank_values(layouts("llama")["dp2"], ref)
    assert distance(values["loss"], ref.loss) < 1e-12


@pytest.mark.parametrize("model", ["llama", "gpt2 tied"])
def test_padded_vocabulary_takes_no_probability(model: str) -> None:
    """Padding rows get gradient 0 on every mesh, and the loss is that of the unpadded table."""
    cfg, ref = MODELS[model], reference(MODELS[model])
    unpadded = replace(cfg, vocab_pad=1)
    plain = gpt(unpadded, batch_size=8, dtype=torch.float64)
    params = optree.tree_map(lambda w: w[: cfg.vocab_size] if w.shape[0] == 56 else w, ref.params)
    loss, _ = differentiate(plain, params, ref.batches)
    assert distance(loss, ref.loss) < 1e-14
    table = "embed.table" if cfg.tied else "head.table"
    assert ref.grads[table][cfg.vocab_size :].abs().max() == 0
    layout = layouts(model)["tp4"]
    last = rank_values(layout, ref)[-1][1]
    grads = dict(zip(*flatten_with_names(last)[:2], strict=True))
    assert grads[table].shape[0] == 14
    assert grads[table][-6:].abs().max() == 0
    assert grads[table][:-6].abs().max() > 0


def test_labels_in_the_padding_are_an_error_on_one_device() -> None:
    ref = reference(MODELS["llama"])
    wrong = [{**batch, "labels": torch.full_like(batch["labels"], 52)} for batch in ref.batches]
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        differentiate(ref.model, ref.params, wrong)


def test_dropout_differs_between_keys_and_layers_and_agrees_between_meshes() -> None:
    """That masks agree on all meshes is the table's row; that they differ at all is this one."""
    cfg = MODELS["gpt2 dropout"]
    ref = reference(cfg)
    same_key = replace_batches(ref, lambda batch: {**batch, "key": torch.tensor(17)})
    loss, _ = differentiate(ref.model, ref.params, same_key.batches)
    assert distance(loss, ref.loss) > 1e-4
    none, _ = differentiate(
        gpt(replace(cfg, dropout=0.0, attention_dropout=0.0), batch_size=8, dtype=torch.float64),
        ref.params,
        [{k: v for k, v in batch.items() if k != "key"} for batch in ref.batches],
    )
    assert distance(none, ref.loss) > 1e-4


@pytest.mark.parametrize("model", ["llama", "gpt2 dropout", "mqa"])
def test_layout_does_not_show_in_initial_weights(model: str) -> None:
    ref = reference(MODELS[model])
    whole = init(ref.model.params, ref.model.sizes, 5, dtype=torch.float64)
    for layout in layouts(model).values():
        for at in points(layout.sizes)[:: max(1, layout.mesh.num_ranks // 3)]:
            mine = init(
                ref.model.params, ref.model.sizes, 5, layout=layout, coords=at, dtype=torch.float64
            )
            names, leaves, _ = flatten_with_names(ref.model.params)
            flat = zip(names, leaves, *map(optree.tree_leaves, (mine, whole)), strict=True)
            for name, leaf, piece, value in flat:
                spec = layout.spec(leaf.names, tuple(value.shape), name)
                assert torch.equal(piece, cut(value, spec, layout.sizes, at)), f"{name} at {at}"


def test_a_tied_leaf_gets_the_sum_of_both_uses_once() -> None:
    """Its two uses need other syncs: the embedding none over tp, the head's sequence is gathered."""
    ref = reference(MODELS["llama tied"])
    program = lower_model(ref.model, layouts("llama tied")["dp2 tp2 sp"])
    assert program.sync["embed.table"] == ("dp",)
    loss, untied = differentiate(*untie(ref), ref.batches)
    assert distance(loss, ref.loss) < 1e-14
    both = untied["embed.table"] + untied["head.table"]
    assert distance(ref.grads["embed.table"], both) < 1e-12


def untie(ref) -> tuple[Chain, dict]:
    cfg = replace(ref.model.cfg, tied=False)
    params = {**ref.params, "head": {**ref.params["head"], "table": ref.params["embed"]["table"]}}
    return gpt(cfg, batch_size=8, dtype=torch.float64), params


def test_results_of_a_call_are_not_overwritten_by_the_next() -> None:
    ref = reference(MODELS["llama"])
    step = value_and_grad(ref.model, Layout())
    batches = [dict(batch) for batch in ref.batches]
    _, first = step(ref.params, batches)
    kept = optree.tree_map(torch.clone, first)
    step(ref.params, batches[:1])
    assert all(optree.tree_leaves(optree.tree_map(torch.equal, first, kept)))


# -- models that cannot be lowered --------------------------------------------------------------

SMALL = GPTConfig(
    vocab_size=16, seq_length=4, num_layers=1, embed=8, kv_heads=2, head_dim=4, ffn=8
)  # fmt: skip


def with_segment(name: str, segment: Segment) -> Chain:
    model = gpt(SMALL, batch_size=2)
    return replace(model, segments={**model.segments, name: segment})


def with_block(apply) -> Chain:
    model = gpt(SMALL, batch_size=2)
    stack = model.segments["blocks"]
    kinds = {"dense": replace(stack.kinds["dense"], apply=apply)}
    return replace(model, segments={**model.segments, "blocks": replace(stack, kinds=kinds)})


def loss_of(terms):
    return Segment(apply=lambda w, carry, consts, cfg, *, state=None: (None, {"terms": terms(carry, consts)}))


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
            with_block(lambda w, x, consts, cfg, *, state=None: (x.sum(0, keepdim=True).expand(2, 4, 8), {})),
            Rules(batch="dp"),
            r"blocks\.dense: the carry  ?enters as float32\[2/dp, 4, 8\] and leaves as "
            r"float32\[2, 4, 8\] P\(dp\)\. End the block with shard\(x, \.\.\.\) over the axes it began "
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
            r"blocks\.dense: the carry  ?enters as float32\[2, 4, 8\] and leaves as float64\[2, 4, 8\]",
        ),
        (
            with_segment("loss", loss_of(lambda x, consts: {"loss": (x.sum(), x.mean())})),
            Rules(),
            r"loss: the weight of a loss term depends on 'carry'\. Compute weights from the batch "
            r"only; the step needs them before any backward\.",
        ),
        (
            with_segment("loss", loss_of(lambda x, consts: {"loss": (x.sum(1), consts["weights"].sum())})),
            Rules(),
            r"loss: term 'loss' is float32\[2, 16\], float32\[\]\. A term is a pair \(sum, weight\) of "
            r"scalars\.",
        ),
        (
            with_segment("loss", loss_of(lambda x, consts: {"loss": (x.sum(),)})),
            Rules(),
            r"loss: term 'loss' is float32\[\]\. A term is a pair \(sum, weight\) of scalars\.",
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
    from megatree.functional.annotate import shard

    def swapped(w, x, consts, cfg, *, state=None):
        return shard(x, "seq batch embed"), {}

    with pytest.raises(
        ShardingError, match=r"axis 'seq' has size 2 here and size 4 at the model's sizes\."
    ):
        lower_model(with_block(swapped), Layout(Mesh(dp=2), Rules(batch="dp")))


def test_a_carry_that_takes_its_first_gradient_inside_a_stack() -> None:
    """The first layer's carry has none, the others' has: lowered without, layer 2 cut it off."""

    def constant(w, carry, consts, cfg, *, state=None):
        return consts["weights"].double().unsqueeze(-1).expand(2, 4, 8) * 0.1, {}

    def layer(w, x, consts, cfg, *, state=None):
        return torch.tanh(torch.einsum("btd,de->bte", x + 0.1, w["w_up"])), {}

    def loss(w, x, consts, cfg, *, state=None):
        return None, {"terms": {"loss": (x.sum(), consts["weights"].sum())}}

    model = gpt(replace(SMALL, num_layers=3), batch_size=2, dtype=torch.float64)
    stack = replace(
        model.segments["blocks"],
        kinds={"dense": Segment(apply=layer, params={"w_up": Param("embed width")})},
    )
    model = replace(
        model,
        segments={"embed": Segment(apply=constant), "blocks": stack, "loss": Segment(apply=loss)},
        sizes={**model.sizes, "width": 8},
    )
    draw = torch.Generator().manual_seed(0)
    params = {"blocks": {"dense": {"w_up": torch.randn(3, 8, 8, dtype=torch.float64, generator=draw)}}}
    batch = {
        "tokens": torch.zeros(2, 4, dtype=torch.int64),
        "labels": torch.zeros(2, 4, dtype=torch.int64),
        "weights": torch.rand(2, 4, generator=draw),
    }
    value, grads = differentiate(model, params, [batch])
    ref = replace(
        reference(MODELS["llama"]), model=model, params=params, batches=(batch,), loss=value, grads=grads
    )
    assert_like_one_device(ref, Layout(Mesh(dp=2), Rules(batch="dp")))


def test_leaves_in_a_long_list_keep_their_order() -> None:
    """Sorted by name, "rows.10" came before "rows.2": weights changed places silently."""

    def head(w, x, consts, cfg, *, state=None):
        scale = sum((1 + i) * row for i, row in enumerate(w["rows"]))
        return x * scale, {}

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
        reference(MODELS["llama"]), model=model, params=params, batches=(batch,), loss=value, grads=grads
    )
    assert_like_one_device(ref, Layout(Mesh(dp=2), Rules(batch="dp")))
    assert re.fullmatch(r"head\.rows\.\d+", list(grads)[-1])
