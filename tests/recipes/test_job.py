"""A job records what it is, goes on only as the run it was, and refuses ranks that disagree."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.recipes import metrics
from megatree.recipes.config import MeshConfig, RunConfig
from megatree.recipes.job import open_job, run, saved_config
from megatree.recipes.saved import load_config
from megatree.runtime.processes import world_of_group
from tests.ranks import ranks
from tests.recipes.tiny_run import SEQ, tiny_run, with_group

CPU = torch.device("cpu")


def silent(kind: str, fields: Mapping[str, Any]) -> None:
    """Report nothing."""


def test_a_run_keeps_its_config_metrics_and_checkpoints(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, steps=3)
    assert run(CPU, cfg, silent) == 3
    folder = tmp_path / "run"
    assert load_config(folder / "config.json") == cfg
    assert saved_config(folder / "step_00000003") == cfg
    lines = metrics.read(str(folder))
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("saved", 2),
        ("step", 3),
        ("eval", 3),
        ("saved", 3),
    ]
    assert lines[4]["consumed"] == 12
    assert lines[0].keys() == {
        "kind", "step", "loss", "grad_norm", "lr", "ms", "tokens_per_s", "consumed",
    }  # fmt: skip


def test_a_run_cut_short_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """What a user does after a crash: the same command again."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, parts = tiny_run(tmp_path / "whole", steps=5), tiny_run(tmp_path / "parts", steps=5)
    run(CPU, whole, silent)
    open_job(CPU, parts, silent).train(stop=3)  # saved at 2 and 3
    (tmp_path / "parts" / "run" / "step_00000003" / "manifest.msgpack").unlink()
    heard: dict[str, Any] = {}
    run(CPU, parts, lambda kind, fields: heard.update({kind: fields}))
    told = [metrics.read(cfg.checkpoint.dir) for cfg in (whole, parts)]
    losses = [[(line["step"], line["loss"]) for line in one if "loss" in line] for one in told]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[1]] == [1, 2, 3, 4, 5]
    assert heard["start"]["resumed"].endswith("step_00000002")


def test_what_changed_since_the_checkpoint_is_told(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, steps=2)
    run(CPU, cfg, silent)
    heard: dict[str, Any] = {}
    more = with_group(with_group(cfg, "train", steps=3), "optimizer", lr=5e-3)
    assert run(CPU, more, lambda kind, fields: heard.update({kind: fields})) == 3
    assert heard["start"]["changed"] == {"optimizer.lr": [0.01, 0.005], "train.steps": [2, 3]}


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        (
            "model",
            {"ffn": 32},
            r"step_00000002: a checkpoint of another model: model.ffn is 24 there and 32 here\. "
            r"Use the model of the config.json beside it, or another checkpoint.dir\.",
        ),
        ("model", {"norm_eps": 1e-6}, r"model.norm_eps is 1e-05 there and 1e-06 here"),
        ("train", {"seed": 1}, r"was trained on other samples"),
        ("data", {"valid_fraction": 0.4}, r"was trained on other samples"),
        ("checkpoint", {"resume": "never"}, r"run: holds checkpoints up to step_00000002"),
    ],
)
def test_a_run_goes_on_only_as_what_it_was(
    tmp_path: Path, group: str, changes: dict[str, Any], message: str
) -> None:
    cfg = tiny_run(tmp_path, steps=2)
    run(CPU, cfg, silent)
    with pytest.raises(ValueError, match=message):
        run(CPU, with_group(cfg, group, **changes), silent)
    assert load_config(tmp_path / "run" / "config.json") == cfg, "a refused run left its config"


def test_dropout_may_change_on_the_way(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, steps=2)
    run(CPU, cfg, silent)
    dropping = with_group(cfg, "model", dropout=0.1)
    assert run(CPU, with_group(dropping, "train", steps=3), silent) == 3


def shared_run(folder: Path, **fields: Any) -> RunConfig:
    """Return one config for all ranks, its text written once."""
    world = world_of_group()
    return world.broadcast(world.on_first(lambda: tiny_run(folder, **fields)))


@ranks(2)
def test_a_rank_with_another_config_is_refused_by_field(tmp_path: Path) -> None:
    """Started by hand on two machines, two ranks may differ; nothing else would notice."""
    cfg = shared_run(tmp_path, mesh=MeshConfig(dp=2))
    odd = world_of_group().rank == 1
    with pytest.raises(ValueError, match=r"^start: config.train.seed is 9 on rank 1 and 0 on"):
        open_job(CPU, with_group(cfg, "train", seed=9) if odd else cfg, silent)
    with pytest.raises(ValueError, match=r"config.optimizer.lr is 0.5 on rank 1 and 0.01 on"):
        open_job(CPU, with_group(cfg, "optimizer", lr=0.5) if odd else cfg, silent)


@ranks(2)
def test_a_rank_with_another_text_under_the_same_name_is_refused(tmp_path: Path) -> None:
    cfg = shared_run(tmp_path, mesh=MeshConfig(dp=2))
    text = Path(cfg.data.text)
    if world_of_group().rank == 1:
        own = tmp_path / "own.jsonl"
        own.write_text(text.read_text(encoding="utf-8").replace("cat", "dog"), encoding="utf-8")
        _read_instead(text, own)
    with pytest.raises(ValueError, match=r"^start: data.train is \w{64} on rank 1 and \w{64} on"):
        open_job(CPU, cfg, silent)


def _read_instead(path: Path, other: Path) -> None:
    """Make this process read another file under a path."""
    real = Path.read_bytes
    Path.read_bytes = lambda self: real(other if self == path else self)  # type: ignore[method-assign]


@ranks(2)
def test_a_job_has_the_same_losses_on_any_mesh(tmp_path: Path) -> None:
    losses = []
    for name, mesh in {"tp": MeshConfig(tp=2), "dp": MeshConfig(dp=2)}.items():
        (tmp_path / name).mkdir(exist_ok=True)
        cfg = shared_run(tmp_path / name, mesh=mesh)
        run(CPU, cfg, silent)
        lines = metrics.read(cfg.checkpoint.dir)
        losses.append(
            {
                (line["kind"], line["step"]): line.get("loss") or line["valid_loss"]
                for line in lines
                if line["kind"] != "saved"
            }
        )
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^mesh: dp=2 tp=1 has 2 ranks, and 1 processes run\."):
        run(CPU, tiny_run(tmp_path, mesh=MeshConfig(dp=2)), silent)


def test_tokens_per_step_are_what_the_loop_reads(tmp_path: Path) -> None:
    heard: dict[str, Any] = {}
    open_job(CPU, tiny_run(tmp_path), lambda kind, fields: heard.update({kind: fields}))
    assert heard["start"]["tokens_per_step"] == 4 * SEQ
    assert json.loads(json.dumps(heard["start"])) == heard["start"]
