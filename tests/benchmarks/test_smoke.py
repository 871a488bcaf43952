"""The benchmarks run, and the two sides they time do the same work."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cpu_step, lowering
from benchmarks.pairs import interleave, spread
from megatree.models.gpt import GPTConfig, gpt
from megatree.runtime.processes import launch

TINY = GPTConfig(
    vocab_size=32, seq_length=8, num_layers=2, embed=16, kv_heads=2, group=2, head_dim=4, ffn=24
)
COMPILER_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
VIEWS = {
    "alias", "detach", "expand", "permute", "split", "t", "transpose", "unsqueeze", "view",
    "_unsafe_view",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts the kernels that run, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def kernels(run: Callable[[], object]) -> Counter[str]:
    with Counted() as counted:
        run()
    return counted.kernels


def both_blocks() -> list[Callable[[], list[torch.Tensor]]]:
    program, comm = lowering.trace_block(TINY, 2), lowering.LocalComm()
    inputs = lowering.inputs_of(program)
    fns = program.bind(comm), lowering.handwritten(TINY, comm)
    return [lowering.forward_backward(fn, inputs) for fn in fns]


def test_a_generated_block_runs_the_kernels_of_the_handwritten_one():
    """Only here: a copy, a cast or a collective that lowering adds and nobody needs."""
    generated, by_hand = map(kernels, both_blocks())
    assert generated["mm"] == 7 * 3  # 7 weights, each with one product forward and two backward
    assert generated == by_hand


def test_a_generated_block_equals_the_handwritten_one_bit_for_bit():
    generated, by_hand = both_blocks()
    assert lowering.distance(generated(), by_hand()) == 0.0


def test_pairs_give_the_ratio_of_what_is_called():
    """Only here: the two sides of a ratio swapped."""
    matrix = torch.ones(256, 256)
    pairs = interleave(
        lambda: [matrix @ matrix for _ in range(20)], lambda: matrix @ matrix, pairs=9
    )
    assert len(pairs.ratios) == 9
    assert spread(pairs.cpu_ratios)["median"] > 4.0


def test_both_models_have_the_same_parameters():
    theirs = cpu_step.their_model(cpu_step.DEMO)
    ours = gpt(cpu_step.DEMO, batch_size=1)
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_params == 922_752


@pytest.mark.full
@COMPILER_WARNS
def test_a_compiled_block_equals_the_eager_one():
    program = lowering.trace_block(TINY, 2)
    fn, inputs = program.bind(lowering.LocalComm()), lowering.inputs_of(program)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    eager = lowering.forward_backward(fn, inputs)
    assert lowering.distance(lowering.forward_backward(compiled, inputs)(), eager()) < 1e-6


@pytest.mark.full
def test_a_compiled_block_equals_the_eager_one_on_two_processes():
    """Only here: a collective of a real process group that the compiler cannot trace."""
    assert launch(lowering.compiled_on_rank, 2, TINY, 2, "aot_eager", threads=1) < 1e-6


@pytest.mark.full
def test_a_warm_trace_and_a_bind_are_timed():
    rows = list(lowering.measure_trace(TINY, 2, 3))
    assert [row["what"] for row in rows] == ["trace", "bind"]
    assert min(row["cpu_ms"] for row in rows) > 0.0


@pytest.mark.full
@pytest.mark.parametrize("layout", cpu_step.LAYOUTS.values(), ids=cpu_step.LAYOUTS)
def test_steps_of_both_are_timed(layout):
    if layout.mesh.num_ranks == 1:
        pairs = cpu_step.measure(None, TINY, 2, layout, 2)
    else:
        pairs = launch(cpu_step.measure, 2, TINY, 2, layout, 2, threads=1)
    assert len(pairs.ours) == len(pairs.theirs) == 2
    assert min(pairs.ours + pairs.theirs) > 0.0
