"""The loss and gradients of a model on a mesh, against the model's own fold on one device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import optree
import torch
from torch import Tensor

from megatree.functional.chain import Chain
from megatree.functional.documents import positions_of
from megatree.functional.param import padded_shape
from megatree.functional.tree import flatten_with_names, map_with_names
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.assemble import assemble
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import Layout, cut
from megatree.parallel.model import ModelProgram, lower_model
from megatree.parallel.order import to_order
from megatree.parallel.packing import views
from megatree.parallel.threads import ThreadComm, Threads
from megatree.parallel.types import make_type
from megatree.runtime.gradients import make_gradients, whole_gradients
from tests.tolerances import RELATIVE, assert_leaves_close

BATCH, MICROBATCHES = 8, 2


@dataclass(frozen=True)
class Reference:
    """A model with random weights, and what one device makes of it.

    Args:
        model: the chain, in float64.
        params: whole weights: no leaf is zero or all ones, so that a lost bias shows.
        batches: whole microbatches, with unequal loss masks.
        loss: summed over all microbatches, over the weight of all.
        grads: leaf name -> gradient.
    """

    model: Chain
    params: Any
    batches: tuple[Mapping[str, Tensor], ...]
    loss: Tensor
    grads: Mapping[str, Tensor]


@lru_cache
def reference(cfg: GPTConfig, entries: tuple[str, ...] = ()) -> Reference:
    """Draw weights and microbatches, and differentiate the fold of the model.

    Args:
        cfg: of the model.
        entries: what its batch has beside tokens, labels and weights: positions and segments.
    """
    model = gpt(cfg, batch_size=BATCH, dtype=torch.float64, entries=entries)
    draw = torch.Generator().manual_seed(0)
    params = map_with_names(
        lambda name, leaf: _weights(name, padded_shape(leaf, model.sizes, name), draw), model.params
    )
    batches = tuple(
        {**_batch(cfg, number, draw), **_documents(cfg, entries, draw)}
        for number in range(MICROBATCHES)
    )
    loss, grads = differentiate(model, params, batches)
    return Reference(model, params, batches, loss, grads)


def differentiate(
    model: Chain, params: Any, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of plain torch, by leaf name."""
    leaves = optree.tree_map(lambda w: w.clone().requires_grad_(), params)
    terms = [model.apply(leaves, batch)[1]["loss"]["terms"]["loss"] for batch in batches]
    loss = torch.stack([s for s, _ in terms]).sum() / torch.stack([w for _, w in terms]).sum()
    loss.backward()
    names, flat, _ = flatten_with_names(leaves)
    return loss.detach(), {name: leaf.grad for name, leaf in zip(names, flat, strict=True)}


def _weights(name: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    centre = 1.0 if "norm" in name.split(".")[-1] else 0.0
    return centre + 0.3 * torch.randn(shape, dtype=torch.float64, generator=draw)


def _batch(cfg: GPTConfig, number: int, draw: torch.Generator) -> dict[str, Tensor]:
    shape = (BATCH, cfg.seq_length)
    tokens = torch.randint(cfg.vocab_size, shape, generator=draw)
    labels = torch.randint(cfg.vocab_size, shape, generator=draw)
    labels[number, :3] = -100
    # A third of the first microbatch counts, a sixth of the second, and some rows not at all.
    weights = (torch.rand(shape, generator=draw) < 1 / (3 + 3 * number)).float()
    weights[number] = 0.0
    batch = {"tokens": tokens, "labels": labels, "weights": weights}
    return {**batch, "key": torch.tensor(17 + number)} if cfg.random else batch


def _documents(
    cfg: GPTConfig, entries: tuple[str, ...], draw: torch.Generator
) -> dict[str, Tensor]:
    starts = torch.rand((BATCH, cfg.seq_length), generator=draw) < 0.4
    segments = starts.cumsum(1)
    made = {"segments": segments, "positions": positions_of(segments)}
    return {name: made[name] for name in entries}


def rank_inputs(
    ref: Reference, program: ModelProgram, comm: RankComm
) -> tuple[Any, list[dict[str, Tensor]]]:
    """Return one rank's pieces of the weights and of the microbatches."""
    layout, sizes = program.layout, program.layout.sizes

    def piece(name: str, leaf: Any, value: Tensor) -> Tensor:
        return cut(value, layout.spec(leaf.names, tuple(value.shape), name), sizes, comm.coords)

    def part(name: str, value: Tensor) -> Tensor:
        ty = program.consts.types[f"batch.{name}"]
        ordered = to_order(value, ty.permuted, layout.num_chunks)
        return cut(ordered, ty.spec, sizes, comm.coords).clone()

    batches = [{name: part(name, value) for name, value in b.items()} for b in ref.batches]
    return map_with_names(piece, ref.model.params, ref.params), batches


def gradients_on(
    program: ModelProgram, comm: RankComm, params: Any, batches: Any
) -> tuple[dict[str, Tensor], Any]:
    """Do what `value_and_grad` does, with a program that all simulated ranks share."""
    gradients = make_gradients(program, comm)
    gradients.weights.fill(params)
    values, _, _ = gradients(batches)
    return values, views(gradients.groups, whole_gradients(gradients), program.model.params)


@dataclass(frozen=True)
class Compared:
    """A step on simulated ranks that agreed with one device.

    Args:
        program: the lowered model.
        counts: collectives that every rank executed, by kind.
    """

    program: ModelProgram
    counts: Mapping[str, int]


def assert_like_one_device(ref: Reference, layout: Layout) -> Compared:
    """Run a step on simulated ranks; compare the loss and all gradients with one device's.

    Every rank's loss and every copy of a gradient is compared.
    """
    program = lower_model(ref.model, layout)

    def rank_main(comm: ThreadComm) -> tuple[Tensor, list[Tensor], dict[str, int]]:
        values, grads = gradients_on(program, comm, *rank_inputs(ref, program, comm))
        return values["loss"], optree.tree_leaves(grads), comm.counts

    results = Threads(layout.sizes).run(rank_main)
    names, declared, _ = flatten_with_names(ref.model.params)
    got = {"loss": torch.stack([loss for loss, _, _ in results])}
    expected = {"loss": ref.loss.expand(len(results)), **ref.grads}
    for at, (name, leaf) in enumerate(zip(names, declared, strict=True)):
        shape = tuple(expected[name].shape)
        ty = make_type(shape, torch.float64, layout.spec(leaf.names, shape, name), layout.sizes)
        pieces = [grads[at] for _, grads, _ in results]
        got[name] = assemble(pieces, ty, layout.sizes, name, rtol=RELATIVE[torch.float64])
    assert_leaves_close(got, expected)
    counts = [counts for _, _, counts in results]
    assert all(other == counts[0] for other in counts), f"ranks executed {counts}"
    return Compared(program, counts[0])
