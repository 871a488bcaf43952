"""Steps over cut sequences: loss and all gradients of one device, alone and mixed with all else."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.chain import Segment
from megatree.functional.param import Array
from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import gpt, loss
from megatree.models.gpt_config import GPTConfig
from megatree.parallel.context import AllGather, Hierarchical, Ring, Ulysses
from megatree.parallel.layout import Layout, Rules, cut
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.order import Zigzag, to_order
from megatree.parallel.schedule import interleaved, one_f_one_b, zero_bubble_h1
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.debug import debug
from megatree.runtime.gradients import value_and_grad
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from megatree.runtime.train import share_of
from tests.functional.check import rand
from tests.ranks import ranks
from tests.runtime import test_pipeline as pipeline
from tests.runtime.one_device import assert_like_one_device, rank_inputs, reference
from tests.runtime.table import MODELS
from tests.tolerances import assert_leaves_close

BOTH = ("positions", "segments")
TENSOR = {"batch": "dp", "kv_heads": "tp", "ffn": "tp", "vocab": "tp"}
FULL = pytest.mark.full


ZIGZAG = Zigzag()


def layout(
    mesh: Mesh, how: Any, *, order: Zigzag | None = ZIGZAG, sp: bool = True, **more: Any
) -> Layout:
    over = ("cp", "tp") if sp else "cp"
    rules = Rules(**TENSOR, seq="cp", seq_res=over, lower={"attention": how})
    return Layout(mesh, rules, order=order, **more)


CP4 = Mesh(cp=4)
ROWS: list[tuple[str, tuple[str, ...], Layout]] = [
    ("llama", (), layout(CP4, Ring())),
    ("llama", BOTH, layout(CP4, AllGather())),
    ("llama tied", (), layout(Mesh(cp=2), Ulysses())),
    ("llama", BOTH, layout(Mesh(cp=4).refine(fast=2), Hierarchical())),
    # learned rows are sliced by index: the order of the residual is the layout's
    ("gpt2 tied", (), layout(CP4, Ring())),
    ("gpt2 tied", ("segments",), layout(Mesh(cp=2), AllGather())),
    ("gpt2 dropout", BOTH, layout(Mesh(cp=2), Ulysses())),
    ("gpt2 dropout", (), layout(Mesh(dp=2, cp=2), AllGather())),
    ("llama", BOTH, layout(Mesh(dp=2, cp=2, tp=2), Ring())),
    ("llama", (), layout(Mesh(dp=2, cp=2, tp=2), Ulysses(), sp=False)),
    ("squared relu", (), layout(Mesh(cp=2, tp=2), Ring(), order=None)),
]


@pytest.mark.parametrize(("model", "entries", "where"), ROWS, ids=lambda x: str(x)[:60])
def test_a_step_over_a_cut_sequence_is_one_device(
    model: str, entries: tuple[str, ...], where: Layout
) -> None:
    """The central table for cp: labels and masks cross chunk borders, rows have documents."""
    assert_like_one_device(reference(MODELS[model], entries), where)


@pytest.mark.parametrize(
    ("mesh", "schedule", "how"),
    [
        ({"pp": 2, "cp": 2, "tp": 2}, one_f_one_b, Ring()),
        ({"pp": 2, "dp": 2, "cp": 2}, zero_bubble_h1, AllGather()),
        pytest.param({"pp": 2, "cp": 4}, interleaved, Ulysses(), marks=FULL),
        pytest.param({"pp": 2, "dp": 2, "cp": 2, "tp": 2}, one_f_one_b, Ring(), marks=FULL),
    ],
)
def test_pipelines_of_cut_sequences_are_one_device(
    mesh: dict[str, int], schedule: Any, how: Any
) -> None:
    where = layout(Mesh(**mesh), how, schedule=schedule)
    pipeline.check(pipeline.LLAMA, where, steps=1)


def check_on_processes(model: str, entries: tuple[str, ...], where: Layout) -> None:
    """Compare this rank's loss and pieces of all gradients with one device's."""
    ref = reference(MODELS[model], entries)
    comm = ProcessComm(where.mesh)
    params, batches = rank_inputs(ref, lower_model(ref.model, where), comm)
    values, grads = value_and_grad(ref.model, where, comm=comm)(params, batches)
    names, declared, _ = flatten_with_names(ref.model.params)
    got = {"loss": values["loss"], **dict(zip(*flatten_with_names(grads)[:2], strict=True))}
    expected = {"loss": ref.loss}
    for path, leaf in zip(names, declared, strict=True):
        whole = ref.grads[path]
        spec = where.spec(leaf.names, tuple(whole.shape), path)
        expected[path] = cut(whole, spec, where.sizes, comm.coords)
    assert_leaves_close(got, expected)


@ranks(2, timeout_s=180.0)
def test_two_processes() -> None:
    for how in (Ring(), Ulysses()):
        check_on_processes("llama", BOTH, layout(Mesh(cp=2), how))


@ranks(4, timeout_s=180.0)
def test_four_processes() -> None:
    check_on_processes("llama", (), layout(CP4, Ring()))
    check_on_processes("llama", BOTH, layout(Mesh(cp=4).refine(fast=2), Hierarchical()))
    check_on_processes("gpt2 tied", (), layout(Mesh(cp=2, tp=2), AllGather()))


TINY: Any = {"vocab_size": 64, "seq_length": 16, "num_layers": 1, "embed": 8, "ffn": 8}
ROWS_OF_TOKENS = torch.arange(4 * 17).reshape(4, 17) % 64
WHOLE = {
    "tokens": ROWS_OF_TOKENS[:, :-1],
    "labels": ROWS_OF_TOKENS[:, 1:],
    "weights": torch.ones(4, 16),
}


def test_a_loader_reads_the_chunks_that_a_step_cuts() -> None:
    """A rank reads its early and its late chunk of columns, labels shifted before."""
    cfg = GPTConfig(
        vocab_size=64, seq_length=16, num_layers=1, embed=8, kv_heads=2, head_dim=4, ffn=8
    )
    where = layout(Mesh(dp=2, cp=2), Ring())
    model = gpt(cfg, batch_size=4)
    whole = WHOLE

    def rank_main(comm: ThreadComm) -> tuple[dict[str, Tensor], Any]:
        step = train_step(model, where, adamw(1e-3), comm=comm)
        return step.local(whole), share_of(step, 4)

    for rank, (local, share) in enumerate(Threads(where.sizes).run(rank_main)):
        lo, hi = share.rows
        chunks = [0, 3] if rank % 2 == 0 else [1, 2]
        columns = np.concatenate([np.arange(4 * c, 4 * c + 4) for c in chunks])
        assert share.columns.tolist() == columns.tolist()
        assert torch.equal(local["tokens"], whole["tokens"][lo:hi, columns])
        assert torch.equal(local["labels"], whole["labels"][lo:hi, columns])
        # the label of a chunk's last token lies in another rank's chunk
        assert torch.equal(local["labels"][:, 3], ROWS_OF_TOKENS[lo:hi, 4 * chunks[0] + 4])


def test_a_lost_order_of_the_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ref = reference(MODELS["llama"])
    monkeypatch.setattr("tests.runtime.one_device.to_order", lambda x, dims, chunks: x)
    with pytest.raises(AssertionError):
        assert_like_one_device(ref, layout(Mesh(cp=2), Ring()))


def per_token(w: Any, carry: Tensor, consts: Any, cfg: Any, *, state: Any = None) -> Any:
    """Return the loss, and what every token had of it."""
    _, out = loss(w, carry, consts, cfg)
    return None, {**out, "labels": consts["labels"] + 0, "weights": consts["weights"] * 2}


def test_metrics_of_every_token_come_back_in_natural_order() -> None:
    cfg = GPTConfig(**TINY, kv_heads=2, head_dim=4)
    model = gpt(cfg, batch_size=4)
    segments = {**model.segments, "loss": Segment(apply=per_token)}
    model = replace(model, segments=segments)

    def rank_main(comm: ThreadComm) -> dict[str, Tensor]:
        step = train_step(model, layout(Mesh(dp=2, cp=2), Ring()), adamw(1e-3), comm=comm)
        _, metrics = step(step.init(0), [step.local(WHOLE)])
        return metrics.outs

    for outs in Threads({"dp": 2, "cp": 2}).run(rank_main):
        assert torch.equal(outs["loss.labels"][0], WHOLE["labels"])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.attention(q, k, v)


def test_the_debug_driver_runs_a_lowering_op_by_op() -> None:
    where = Layout(Mesh(cp=2), Rules(seq="cp", lower={"attention": Ring()}), order=ZIGZAG)
    shapes = [(2, 8, 2, 1, 4), (2, 8, 2, 4), (2, 8, 2, 4)]
    values = [rand(*shape, seed=i) for i, shape in enumerate(shapes)]
    axes = ["batch seq heads group k", "batch seq heads k", "batch seq heads k"]
    abstract = [Array(a, torch.float64, s, True) for a, s in zip(axes, shapes, strict=True)]

    def rank_main(comm: ThreadComm) -> Tensor:
        pieces = [to_order(x, (1,), 4).chunk(2, 1)[comm.rank].clone() for x in values]
        return debug(attend, where, comm, *pieces, abstract=abstract)

    whole = torch.cat(Threads({"cp": 2}).run(rank_main), 1)
    expected = to_order(F.attention(*values), (1,), 4)
    assert (whole - expected).norm() < 1e-12 * expected.norm()
