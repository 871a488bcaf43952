"""Text from a run's own folder, and the meshes that generation refuses."""

from pathlib import Path

import pytest
import torch

from megatree.recipes.config import MeshConfig
from megatree.recipes.job import run
from megatree.recipes.sample import Sampling, sample
from tests.recipes.tiny_run import tiny_run

CPU = torch.device("cpu")
PROMPTS = ("the cat sat", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run(CPU, tiny_run(tmp_path, steps=3), lambda kind, fields: None)
    return tmp_path / "run"


def continued(folder: Path, **how: float) -> list[str]:
    return sample(CPU, str(folder), MeshConfig(), PROMPTS, Sampling(max_tokens=6, **how))  # type: ignore[arg-type]


def test_the_latest_checkpoint_of_a_folder_is_taken(folder: Path) -> None:
    made = continued(folder)
    assert made == continued(folder / "step_00000003")
    assert made != continued(folder / "step_00000002")
    assert all(made)


def test_a_draw_is_a_function_of_its_seed(folder: Path) -> None:
    drawn = [continued(folder, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            MeshConfig(dp=4),
            r"^mesh: 2 prompts do not divide over 4 ranks \(dp=4 tp=1\)\. Give 4 prompts, or set",
        ),
        (MeshConfig(tp=2), r"^mesh: dp=1 tp=2 has 2 ranks, and 1 processes run\."),
    ],
)
def test_a_mesh_that_is_not_for_generation_is_refused(
    folder: Path, mesh: MeshConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(CPU, str(folder), mesh, PROMPTS, Sampling())


def test_what_was_not_trained_by_the_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: no checkpoint and no folder of checkpoints"):
        sample(CPU, str(tmp_path / "nothing"), MeshConfig(), PROMPTS, Sampling())
