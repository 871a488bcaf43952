"""The central table: loss and all gradients of a step equal one device's, on any mesh."""

import itertools
from dataclasses import replace
from functools import lru_cache
from typing import Any

import optree
import pytest
import torch

from megatree.functional.chain import Chain
from megatree.functional.param import Array, init
from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import block, gpt
from megatree.parallel.assemble import points
from megatree.parallel.layout import Layout, cut
from megatree.parallel.model import lower_model
from megatree.parallel.packing import pack
from megatree.parallel.program import Program
from megatree.parallel.threads import Threads
from megatree.runtime.gradients import value_and_grad
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
    """Float64, two microbatches of unequal weight: forward parity would not see most of it."""
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

_SP = {"all_gather": 2, "psum_scatter": 2}
_HALF = {"all_gather": 2, "psum_scatter": 1}
BLOCK = {
    "dp2": ({}, {}),
    "tp2": ({"psum": 2}, {"psum": 2}),
    "dp2 tp2": ({"psum": 2}, {"psum": 2}),
    "tp2 sp": (_SP, _SP),
    "dp2 tp4 sp": (_SP, _SP),
    "tp over two, swapped": (_SP, _SP),
    "attention alone": (_HALF, _HALF),
}


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
    return (
        lower_model(reference(MODELS[model]).model, layouts(model)[name])
        .units["blocks.dense"]
        .program
    )


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
    "rope": Array("_ _"),
    "key": Array("", torch.int64),
    "layer": Array("", torch.int64),
}


# -- rows of section 7, each alone --------------------------------------------------------------


def rank_values(layout: Layout, ref, batches=None):
    program = lower_model(ref.model, layout)

    def rank_main(comm):
        params, mine = rank_inputs(ref, program, comm)
        return value_and_grad(ref.model, layout, comm=comm)(params, batches or mine)

    return Threads(layout.sizes).run(rank_main)


def test_a_step_in_which_every_token_is_masked_is_refused() -> None:
    ref = reference(MODELS["llama"])
    masked = replace_batches(
        ref, lambda batch: {**batch, "weights": torch.zeros_like(batch["weights"])}
    )
    text = (
        r"step: loss terms \['loss'\] have no weight in any of 2 microbatches \(every token is "
        r"masked\)\. "
        r"Give the step a batch with at least one token that counts\."
    )
    for name in ("one rank", "dp2 tp2"):
        with pytest.raises(ValueError, match=text):
            rank_values(layouts("llama")[name], masked)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda batch: {name: x for name, x in batch.items() if name != "labels"},
            r"batch: has \['tokens', 'weights'\], the model takes \['labels', 'tokens', "
            r"'weights'\]\. "
            r"Add or drop \['labels'\]\.",
        ),
        (
            lambda batch: {name: x[:4] for name, x in batch.items()},
            r"batch\.tokens: is torch\.int64 \[4, 8\], this rank's piece of int64\[8, 8\] is "
            r"torch\.int64 \[8, 8\]\. Cut the microbatch by the layout, or lower the model for "
            r"other "
            r"sizes \(Chain\.with_sizes\)\.",
        ),
        (
            lambda batch: {**batch, "labels": batch["labels"].int()},
            r"batch\.labels: is torch\.int32 \[8, 8\], this rank's piece of int64\[8, 8\]",
        ),
    ],
)
def test_a_microbatch_of_another_form_is_refused(change: Any, text: str) -> None:
    """A program counts and offsets by the shapes it was lowered for: a mean would be wrong."""
    ref = reference(MODELS["llama"])
    with pytest.raises(ValueError, match=text):
        value_and_grad(ref.model, Layout())(ref.params, [change(batch) for batch in ref.batches])


def test_a_step_without_a_loss_is_refused() -> None:
    """It would return no value, and gradients that are all 0."""
    ref = reference(MODELS["llama"])
    text = r"step: no segment of \['blocks\.dense', 'embed', 'head'\] has a loss term\. Return"
    with pytest.raises(ValueError, match=text):
        value_and_grad(ref.model.up_to("head"), Layout())(ref.params, list(ref.batches))


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
    assert distance(torch.stack(parts).mean(), ref.loss) > 1e-3
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
    """Its two uses need other syncs: none over tp for rows, a gathered sequence for the head."""
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
