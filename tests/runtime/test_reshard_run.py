"""A run that goes on under other layouts follows the one that did not stop (simulated ranks)."""

from pathlib import Path
from typing import Any

import torch

from megatree.io.checkpoint import step_name
from megatree.models.gpt import gpt
from megatree.models.gpt_config import GPTConfig
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.schedule import one_f_one_b
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from megatree.runtime.train import Loop, begin, train
from tests.runtime.lowered_once import lowered_once
from tests.runtime.tiny_step import BATCH, SEQ, tiny_data
from tests.thread_worlds import threaded_worlds

TENSOR = Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
CFG = GPTConfig(
    vocab_size=32, seq_length=SEQ, num_layers=4, embed=16, kv_heads=4, group=2, head_dim=4, ffn=24
)
WAY = (
    (Layout(Mesh(pp=4, tp=4), TENSOR, schedule=one_f_one_b), 2),
    (Layout(Mesh(pp=2, tp=2), TENSOR, schedule=one_f_one_b), 6),
    (Layout(Mesh(dp=4), Rules(batch="dp")), 10),
)
"""Layouts, and the step at which the run stops under each."""


def run(layout: Layout, stop: int, directory: Path, resume: str) -> dict[int, float]:
    """Train to a step and save there; return the losses by step."""
    worlds = threaded_worlds(layout.mesh.num_ranks)
    model = gpt(CFG, batch_size=BATCH, dtype=torch.float64)

    def rank_main(comm: ThreadComm) -> dict[int, float]:
        heard: dict[int, float] = {}

        def listen(kind: str, fields: Any) -> None:
            if kind == "step":
                heard[fields["step"]] = fields["loss"]

        step = train_step(model, layout, adamw(1e-2), comm=comm, seed=3)
        loop = Loop(steps=stop, global_batch=2 * BATCH, microbatch=BATCH, directory=str(directory))
        world = worlds[comm.rank]
        progress = begin(step, resume, data=tiny_data(), world=world)
        train(step, progress, loop, data=tiny_data(), lr=float, world=world, report=listen)
        return heard

    with lowered_once():
        return Threads(layout.mesh.sizes).run(rank_main)[0]


def test_tp4_pp4_then_tp2_pp2_then_dp4_follows_the_uninterrupted_run(tmp_path: Path) -> None:
    expected = run(Layout(), 10, tmp_path / "whole", "")
    got: dict[int, float] = {}
    resume = ""
    for layout, stop in WAY:
        got |= run(layout, stop, tmp_path / "way", resume)
        resume = str(tmp_path / "way" / step_name(stop))
    assert list(got) == list(expected) == list(range(1, 11))
    wrong = {n: got[n] - loss for n, loss in expected.items() if abs(got[n] - loss) > 1e-10 * loss}
    assert not wrong
    assert expected[10] < 0.9 * expected[1], "nothing is learned: resuming wrongly would not show"
