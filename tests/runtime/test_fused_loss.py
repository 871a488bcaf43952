"""Head and loss as one op: every loss and gradient is that of the two, on any mesh and schedule."""

from dataclasses import replace

import pytest
import torch

from megatree.functional import linear_loss
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules, Storage
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.plan.activations import Activations
from megatree.parallel.schedule import one_f_one_b, zero_bubble_h1
from tests.runtime import test_pipeline
from tests.runtime.one_device import BATCH, Reference, assert_like_one_device, reference
from tests.runtime.table import MODELS, layouts
from tests.tolerances import RELATIVE, distance

TENSOR = Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
ZERO3 = Storage(params="dp", grads="dp", opt="dp")

ROWS: dict[str, tuple[str, Layout]] = {
    "one rank": ("llama", Layout()),
    "tp2": ("llama", layouts("llama")["tp2"]),
    "dp2 tp2 sp": ("llama", layouts("llama")["dp2 tp2 sp"]),
    "tied, tp4 sp": ("gpt2 tied", layouts("gpt2 tied")["tp4 sp"]),
    "mixed": ("llama tied", layouts("llama tied")["mixed"]),
    "zero-3": ("llama", Layout(Mesh(dp=2, tp=2), TENSOR, storage=ZERO3)),
    "zero-3, tied": ("gpt2 tied", Layout(Mesh(dp=2), Rules(batch="dp"), storage=ZERO3)),
}
PIPELINES: dict[str, tuple[GPTConfig, Layout]] = {
    "1f1b, tied": (test_pipeline.GPT2, Layout(Mesh(pp=2), schedule=one_f_one_b)),
    "zero bubble": (
        test_pipeline.LLAMA,
        Layout(Mesh(pp=2, tp=2), TENSOR, schedule=zero_bubble_h1),
    ),
}


def fused(model: str) -> Reference:
    """Return a model with head and loss fused, beside what one device makes of it unfused."""
    ref = reference(MODELS[model])
    cfg = replace(MODELS[model], fused_loss=True)
    return replace(ref, model=gpt(cfg, batch_size=BATCH, dtype=torch.float64))


@pytest.mark.parametrize("row", ROWS)
def test_gradients_are_those_of_head_and_loss_apart(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear_loss.CHUNK_ELEMENTS, "cpu", 56 * 5)  # several chunks, the last short
    monkeypatch.setattr(linear_loss, "CHUNK_ROWS", 1)
    model, layout = ROWS[row]
    assert_like_one_device(fused(model), layout)


@pytest.mark.parametrize("row", PIPELINES)
def test_a_pipeline_trains_as_one_device_does(row: str) -> None:
    """Split backwards included: the table's gradient is made by the forward, and not deferred."""
    cfg, layout = PIPELINES[row]
    test_pipeline.check(replace(cfg, fused_loss=True), layout)


def test_sequence_parallel_gradients_are_scattered_as_without_fusion() -> None:
    """Were x the same on all ranks, its gradient would be summed whole on every one."""
    counts = []
    for ref in (reference(MODELS["llama"]), fused("llama")):
        program = lower_model(ref.model, layouts("llama")["tp2 sp"])
        counts.append(program.units["head"].program.counts("backward"))
    assert counts == [{"psum_scatter": 1}] * 2


def test_logits_are_there_where_the_chain_ends_with_the_head() -> None:
    ref, both = reference(MODELS["llama"]), fused("llama")
    batch = ref.batches[0]
    logits = [r.model.up_to("head").apply(r.params, batch)[0] for r in (ref, both)]
    assert torch.equal(*logits)
    carry, outs = both.model.apply(ref.params, batch)
    assert carry is None
    total, weight = outs["head"]["terms"]["loss"]
    expected, _ = ref.model.apply(ref.params, batch)[1]["loss"]["terms"]["loss"]
    assert distance(total, expected) < RELATIVE[torch.float64]
    assert weight == batch["weights"].sum()


def test_what_waits_for_the_backward_does_not_grow_with_the_vocabulary_times_the_tokens() -> None:
    cfg = replace(MODELS["llama"], seq_length=64, vocab_size=1024, vocab_pad=1)
    kept = []
    for fuses in (False, True):
        model = gpt(replace(cfg, fused_loss=fuses), batch_size=BATCH)
        kept.append(Activations(lower_model(model, Layout())).of(0).here)
    tokens, embed = BATCH * 64, cfg.embed
    # Before: log-probabilities. Now: the gradients of x and of the table.
    assert kept[0] - kept[1] > 4 * (tokens * 1024 - (tokens + 1024) * embed) * 0.95
