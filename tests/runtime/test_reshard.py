"""Any training state, saved under any layout, loads under any other, bit for bit."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatree.functional.chain import Chain
from megatree.io.checkpoint import Piece, Saver
from megatree.io.world import World
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout
from megatree.parallel.precision import Precision
from megatree.parallel.storage import Storage
from megatree.parallel.threads import Threads
from megatree.recipes.build import layout_of
from megatree.recipes.config import MeshConfig, PipelineConfig, megatron_rules
from megatree.runtime import pieces
from megatree.runtime.optimizers import adamw, sgd, with_ema
from megatree.runtime.step import TrainState, TrainStep, train_step
from tests.runtime.lowered_once import lowered_once
from tests.thread_worlds import threaded_worlds

GPT2 = GPTConfig(
    vocab_size=50, seq_length=8, num_layers=4, embed=16, kv_heads=4, head_dim=4, ffn=16,
    vocab_pad=8, norm="layer", positions="learned", activation="gelu", bias=True, tied=True,
)  # fmt: skip
MODELS = {
    "gpt2": GPT2,
    "llama": replace(
        GPT2, norm="rms", positions="rotary", activation="swiglu", bias=False, tied=False
    ),
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: adamw(1e-2),
    "sgd": lambda: sgd(1e-2, momentum=0.9),
    "ema": lambda: with_ema(adamw(1e-2), decay=0.9),
}
STORAGES = {
    "whole": Storage(),
    "zero-1": Storage(opt="dp"),
    "zero-2": Storage(grads="dp", opt="dp"),
    "zero-3": Storage(params="dp", grads="dp", opt="dp"),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

Cut = tuple[int, int, int, int, int, bool, str]
"""pp, virtual stages, dp, cp, tp, sequence parallelism, storage."""

# Plain values: what the package checks by beartype may not be drawn inside a strategy.
CUTS = st.tuples(
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from(sorted(STORAGES)),
).filter(lambda cut: cut[0] * cut[2] * cut[3] * cut[4] <= 8)


def layout_from(cut: Cut) -> Layout:
    pp, virtual, dp, cp, tp, sp, storage = cut
    mesh = MeshConfig(pp=pp, dp=dp, cp=cp, tp=tp)
    rules = megatron_rules(sequence_parallel=sp and tp > 1)
    pipeline = None
    if pp > 1 and virtual > 1:
        pipeline = PipelineConfig(schedule="interleaved", virtual=virtual)
    kept = STORAGES[storage] if dp > 1 else Storage()
    return replace(layout_of(mesh, rules, pipeline), storage=kept)


@cache
def chain_of(model: str, dtype: str) -> Chain:
    """Return a model, the same one for all who ask: it is lowered once for all ranks."""
    return gpt(MODELS[model], batch_size=4, dtype=DTYPES[dtype])


def make(model: str, optimizer: str, dtype: str, layout: Layout, comm: Any) -> TrainStep:
    chain = chain_of(model, dtype)
    rules = {"precision": Precision(master=dtype == "bfloat16")}
    return train_step(chain, layout, OPTIMIZERS[optimizer](), comm=comm, **rules)


def whole(piece: Piece) -> Tensor:
    """Return a global array, whose elements are a function of its path and their places."""
    count = torch.Size(piece.shape).numel()
    seed = int.from_bytes(piece.path.encode()[-7:], "little")
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(piece.dtype).reshape(piece.shape)


def part(piece: Piece) -> Tensor:
    return whole(piece)[tuple(slice(a, b) for a, b in piece.box)]


def on_all(layout: Layout, fn: Callable[[Any, World], Any]) -> Sequence[Any]:
    worlds = threaded_worlds(layout.mesh.num_ranks)
    with lowered_once():
        return Threads(layout.mesh.sizes).run(lambda comm: fn(comm, worlds[comm.rank]))


def check(model: str, optimizer: str, dtype: str, cuts: Sequence[Cut], *, behind: bool) -> int:
    """Save under the first cut; load and save again under the others; return the leaves."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "0")

        layout = layout_from(cuts[0])

        def first(comm: Any, world: World) -> None:
            step = make(model, optimizer, dtype, layout, comm)
            state = step.init()
            weights = step.gradients.weights
            shards = weights.shards()
            with torch.no_grad():
                for piece in pieces.state_pieces(step, state, shards):
                    piece.tensor.copy_(part(piece))
            weights.publish(shards)
            state.step = 3
            save(path, step, state, world)

        def save(to: str, step: TrainStep, state: Any, world: World) -> None:
            with Saver(world, host_bytes=1 << 13 if behind else 0, block_bytes=1 << 10) as saver:
                pieces.save(to, step, state, world, saver=saver)

        def then(comm: Any, world: World) -> set[str]:
            step = make(model, optimizer, dtype, layout, comm)
            state, _ = pieces.load(path, step, world)
            assert state.step == 3
            found = pieces.state_pieces(step, state, step.gradients.weights.shards())
            for piece in found:
                torch.testing.assert_close(piece.tensor, part(piece), rtol=0, atol=0)
            save(f"{path}{number}", step, state, world)
            return {piece.path for piece in found}

        on_all(layout, first)
        leaves: set[str] = set()
        for number, cut in enumerate(cuts[1:]):
            layout = layout_from(cut)
            for paths in on_all(layout, then):
                leaves |= paths
            path = f"{path}{number}"
        return len(leaves)


def draw(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    drawn = given(
        model=st.sampled_from(sorted(MODELS)),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        dtype=st.sampled_from(sorted(DTYPES)),
        cuts=st.lists(CUTS, min_size=2, max_size=3),
        behind=st.booleans(),
    )
    quick = settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    return lambda body: quick(drawn(body))


def check_drawn(model: str, optimizer: str, dtype: str, cuts: list[Cut], behind: bool) -> None:
    assert check(model, optimizer, dtype, cuts, behind=behind) >= 20


test_drawn_states_under_drawn_layouts = pytest.mark.full(draw(40)(check_drawn))


def test_everything_at_once() -> None:
    """dp, tp, sp, pp, virtual stages and storage change in one step, and back."""
    cuts: list[Cut] = [
        (2, 2, 2, 1, 2, True, "zero-3"),
        (1, 1, 2, 2, 1, False, "zero-1"),
        (2, 1, 1, 1, 2, False, "whole"),
    ]
    # parameters, two moments, masters
    assert check("llama", "adamw", "bfloat16", cuts, behind=True) == 4 * 12


def losses(step: TrainStep, state: TrainState, count: int) -> tuple[TrainState, list[float]]:
    """Make steps on samples that follow the step's number."""
    seen = []
    for _ in range(count):
        draw = torch.Generator().manual_seed(state.step)
        tokens = torch.randint(0, 50, (4, 9), generator=draw)
        entries = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": torch.ones(4, 8)}
        state, metrics = step(state, [step.local(entries)] * 2)
        seen.append(metrics.loss.item())
    return state, seen


@pytest.mark.full
def test_a_run_that_changes_its_layout_twice_follows_one_that_does_not() -> None:
    """tp4 pp4, then tp2 pp2, then dp4: ten steps with AdamW, in float64."""
    cuts: list[Cut] = [
        (4, 1, 1, 1, 4, True, "whole"),
        (2, 1, 1, 1, 2, False, "whole"),
        (1, 1, 4, 1, 1, False, "zero-1"),
    ]
    alone = make("llama", "adamw", "float64", Layout(), None)
    _, expected = losses(alone, alone.init(1), 10)
    seen: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (cut, count) in enumerate(zip(cuts, (4, 3, 3), strict=True)):
            layout = layout_from(cut)

            def go(
                comm: Any,
                world: World,
                number: int = number,
                count: int = count,
                layout: Layout = layout,
            ) -> list:
                step = make("llama", "adamw", "float64", layout, comm)
                path = f"{folder}/{number - 1}"
                state = pieces.load(path, step, world)[0] if number else step.init(1)
                state, made = losses(step, state, count)
                pieces.save(f"{folder}/{number}", step, state, world)
                return made

            everyone = on_all(layout, go)
            assert all(made == everyone[0] for made in everyone)
            seen += everyone[0]
    torch.testing.assert_close(
        torch.tensor(seen, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=0,
    )
    assert len(set(expected)) == 10
