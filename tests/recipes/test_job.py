"""A job records what it is, goes on only as the run it was, and refuses ranks that disagree."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatree.io.checkpoint import load_extra
from megatree.io.data import IndexedWriter, Loader, StepBatch
from megatree.io.tokenizers import write_beside
from megatree.io.world import World
from megatree.recipes import metrics
from megatree.recipes.config import CheckpointConfig, MeshConfig, RunConfig
from megatree.recipes.data import open_data
from megatree.recipes.data_config import DataConfig
from megatree.recipes.job import open_job, run, saved_config
from megatree.recipes.saved import load_config
from megatree.runtime.processes import world_of_group
from megatree.runtime.train import on_device
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
        "kind", "step", "loss", "terms", "grad_norm", "skipped", "loss_scale", "lr", "ms",
        "tokens_per_s", "model_flops_per_s", "mfu", "memory_bytes", "consumed",
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
        ("data", {"seed": 1}, r"was trained on other samples"),
        ("data", {"split": "60,40"}, r"was trained on other samples"),
        ("data", {"samples": 5000}, r"was trained on other samples"),
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
def test_a_rank_with_other_files_under_the_same_name_is_refused(tmp_path: Path) -> None:
    """Two machines with a copy each: one of them is old."""
    world = world_of_group()
    folder = tmp_path / str(world.rank)
    folder.mkdir(parents=True)
    cfg = shared_run(tmp_path, mesh=MeshConfig(dp=2))
    write_pair(folder, range(world.rank, 3000 + world.rank))
    cfg = replace(cfg, data=DataConfig(prefix=("tokens",), split="8,2"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        with pytest.raises(ValueError, match=r"^start: data.tokens is \w{64} on rank 1 and \w{64}"):
            open_job(CPU, cfg, silent)


def write_pair(folder: Path, tokens: Iterable[int]) -> Path:
    """Write a pair of sequences of 30 tokens; return its prefix."""
    ids = np.array([token % 500 for token in tokens])
    with IndexedWriter(folder / "tokens", np.uint16, overwrite=True) as writer:
        for part in np.array_split(ids, len(ids) // 30):
            writer.add_document([part])
    return folder / "tokens"


def file_run(folder: Path, **fields: Any) -> RunConfig:
    """Return the tiny run on a pair of files."""
    prefix = str(write_pair(folder, np.random.default_rng(1).integers(0, 500, 6000)))
    return replace(tiny_run(folder, **fields), data=DataConfig(prefix=(prefix,), split="8,2"))


def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that gets the tokens of every sample that a run learns from, in order."""
    rows: list[list[int]] = []
    real = Loader.__next__

    def noted(self: Loader) -> StepBatch:
        step = real(self)
        if self._ahead is not None:  # not an evaluation
            rows.extend(row for part in step.microbatches for row in part["tokens"].tolist())
        return step

    monkeypatch.setattr(Loader, "__next__", noted)
    return rows


def test_a_run_goes_on_at_the_next_sample_with_another_batch_size_and_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is a function of the samples consumed: not one is skipped or seen twice."""
    rows = rows_read(monkeypatch)
    cfg = file_run(tmp_path, steps=3)
    run(CPU, cfg, silent)
    assert len(rows) == 12
    more = with_group(with_group(cfg, "train", steps=5, global_batch=8), "checkpoint", every=0)
    run(CPU, more, silent)
    assert len(rows) == 12 + 2 * 8
    assert load_extra(tmp_path / "run" / "step_00000005")["consumed"] == 28
    data = open_data(cfg, World.single(), samples=12).train
    assert rows == data.batch(0, 28)["tokens"].tolist()


def test_a_file_that_changes_under_a_run_stops_it(tmp_path: Path) -> None:
    cfg = file_run(tmp_path, steps=6)
    job = open_job(CPU, cfg, silent)
    job = job.train(stop=2)
    write_pair(tmp_path, range(3000))
    with pytest.raises(ValueError, match=r"tokens\.(idx|bin): changed while it was in use"):
        job.train()


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    cfg = file_run(tmp_path, steps=2)
    facts = {"identity": "sha256:" + "a" * 64, "vocab_size": 500, "special": {"eod": 0}}
    write_beside(cfg.data.prefix[0], {"tokenizer": facts})
    run(CPU, cfg, silent)
    write_beside(cfg.data.prefix[0], {"tokenizer": {**facts, "identity": "sha256:" + "b" * 64}})
    with pytest.raises(ValueError, match=r"from tokenizer sha256:b+, but .*step_00000002 was made"):
        run(CPU, with_group(cfg, "train", steps=3), silent)


def test_weights_of_a_run_begin_another_one_on_other_data(tmp_path: Path) -> None:
    first = file_run(tmp_path, steps=3)
    run(CPU, first, silent)
    (tmp_path / "second").mkdir()
    second = replace(
        tiny_run(tmp_path / "second", steps=2),
        checkpoint=CheckpointConfig(
            dir=str(tmp_path / "second" / "run"), weights=str(tmp_path / "run")
        ),
        data=replace(first.data, split="2,8"),
    )
    heard: dict[str, Any] = {}
    job = open_job(CPU, second, lambda kind, fields: heard.update({kind: fields}))
    assert job.progress.state.step == job.progress.consumed == 0
    assert heard["start"]["weights"] == str(tmp_path / "run")
    trained = open_job(CPU, first, silent)
    for name, buffer in job.progress.state.params.items():
        assert torch.equal(buffer, trained.progress.state.params[name])
        assert not any(part[name].any() for part in job.progress.state.opt.values() if part)
    with pytest.raises(ValueError, match=r"a checkpoint of another model: model.ffn"):
        open_job(CPU, with_group(second, "model", ffn=32), silent)


def test_documents_packed_into_a_row_are_learned_as_if_alone(tmp_path: Path) -> None:
    """Attention, positions and labels keep to a document: the loss is that of one document a row.

    The model once got rows of several documents and looked across them.
    """
    losses = {}
    for packing in ("packed", "single"):
        data = {"kind": "packed", "packing": packing, "split": "1,1"}
        cfg = with_group(file_run(tmp_path), "data", **data)
        cfg = replace(
            cfg,
            model=replace(cfg.model, seq_length=64),
            checkpoint=replace(cfg.checkpoint, dir=str(tmp_path / packing)),
        )
        job = open_job(CPU, cfg, silent)
        assert job.data.valid is not None
        rows = len(job.data.valid.dataset)
        losses[packing] = (job.valid_loss(rows // 2 * 2), rows)
    assert losses["packed"][1] * 2 == losses["single"][1] == 100
    assert losses["packed"][0] == pytest.approx(losses["single"][0], rel=1e-6)


def test_what_the_model_does_not_read_is_never_ignored(tmp_path: Path) -> None:
    job = open_job(CPU, file_run(tmp_path), silent)
    rows = {**job.data.train.batch(0, 2), "segments": np.zeros((2, SEQ), np.int64)}
    with pytest.raises(ValueError, match=r"^data: a row has 'segments': the model reads labels,"):
        on_device(job.step, rows)
    del rows["segments"], rows["weights"]
    with pytest.raises(ValueError, match=r"^data: a row lacks 'weights': the model reads labels,"):
        on_device(job.step, rows)


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
