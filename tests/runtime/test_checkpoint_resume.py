"""Where a run stopped does not show: the same bits on a mesh, the same losses on another."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatree.io.checkpoint import step_name
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.storage import Storage
from megatree.runtime.batch_ramp import BatchRamp
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.processes import world_of_group
from megatree.runtime.step import TrainState
from megatree.runtime.train import Loop, begin, train
from tests.ranks import ranks
from tests.runtime.tiny_step import BATCH, tiny_data, tiny_step

TENSOR = Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
LAYOUTS = {
    "tp and sp": Layout(Mesh(tp=2), TENSOR),
    "dp": Layout(Mesh(dp=2), Rules(batch="dp")),
    "zero-3": Layout(Mesh(dp=2), Rules(batch="dp"), storage=Storage("dp", "dp", "dp")),
}


def run(
    layout: Layout, directory: Path, *, stop: int, resume: str = "", dropout: float = 0.1
) -> tuple[TrainState, dict[int, dict[str, Any]]]:
    """Train to a step, saving every third; return the state and what was reported, by step."""
    world = world_of_group()
    step = tiny_step(layout, ProcessComm(layout.mesh), dropout=dropout)
    heard: dict[int, dict[str, Any]] = {}

    def listen(kind: str, fields: Any) -> None:
        if kind == "step":
            heard[fields["step"]] = {key: fields[key] for key in ("loss", "grad_norm", "consumed")}

    loop = Loop(
        steps=stop,
        # It grows within the first part, and again within the second.
        global_batch=BatchRamp(start=BATCH, increment=BATCH, samples=8 * BATCH, final=3 * BATCH),
        microbatch=BATCH,
        save_every=3,
        directory=str(directory),
    )
    progress = begin(step, resume, data=tiny_data(), world=world)
    end = train(step, progress, loop, data=tiny_data(), lr=float, world=world, report=listen)
    return end.state, heard


def buffers(state: TrainState) -> dict[str, torch.Tensor]:
    named = {f"params {name}": buffer for name, buffer in state.params.items()}
    named |= {f"master {name}": buffer for name, buffer in state.master.items()}
    for kind, group in state.opt.items():
        named |= {f"{kind} {name}": buffer for name, buffer in (group or {}).items()}
    return named


@pytest.mark.parametrize(
    "name", ["tp and sp", "zero-3", pytest.param("dp", marks=pytest.mark.full)]
)
@ranks(2)
def test_six_steps_are_three_and_three_bit_for_bit(name: str, tmp_path: Path) -> None:
    """With dropout: its masks must follow the step, not how many the process has made."""
    whole, told = run(LAYOUTS[name], tmp_path / "whole", stop=6)
    expected = {key: buffer.clone() for key, buffer in buffers(whole).items()}
    run(LAYOUTS[name], tmp_path / "parts", stop=3)
    parts, told_again = run(
        LAYOUTS[name],
        tmp_path / "parts",
        stop=6,
        resume=str(tmp_path / "parts" / step_name(3)),
    )
    assert parts.step == whole.step == 6
    found = buffers(parts)
    assert found.keys() == expected.keys()
    assert len(found) >= 6
    for key, buffer in found.items():
        assert torch.equal(buffer, expected[key]), key
    if dist.get_rank() == 0:
        assert told_again == {at: told[at] for at in (4, 5, 6)}


@ranks(2)
def test_another_mesh_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    layouts = list(LAYOUTS.values())
    _, told = run(layouts[0], tmp_path / "whole", stop=6)
    _, told_again = run(
        layouts[1], tmp_path / "other", stop=6, resume=str(tmp_path / "whole" / step_name(3))
    )
    if dist.get_rank() == 0:
        assert told_again.keys() == {4, 5, 6}
        for at, fields in told_again.items():
            assert fields == pytest.approx(told[at], rel=1e-5)
