"""A run's checkpoints as its config says: behind the training, some kept, elsewhere, taken over."""

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from megatree.io.checkpoint import latest, load_extra, read_manifest, steps_in
from megatree.recipes import metrics
from megatree.recipes.config import CheckpointConfig, MeshConfig, RunConfig
from megatree.recipes.job import open_job, run
from megatree.runtime.processes import world_of_group
from tests.ranks import ranks
from tests.recipes.tiny_run import tiny_run, with_group

CPU = torch.device("cpu")


def silent(kind: str, fields: Mapping[str, Any]) -> None:
    """Report nothing."""


def saved_lines(cfg: RunConfig) -> list[dict[str, Any]]:
    return [line for line in metrics.read(cfg.checkpoint.dir) if line["kind"] == "saved"]


def two(folder: Path, **fields: Any) -> tuple[RunConfig, RunConfig]:
    """Return two equal runs in folders of their own."""
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
    return tiny_run(folder / "a", **fields), tiny_run(folder / "b", **fields)


@ranks(2)
def test_behind_the_training_the_same_bytes_are_saved(tmp_path: Path) -> None:
    """On connections of their own: both threads meet other ranks at the same time."""
    world = world_of_group()
    plain, behind = world.broadcast(
        world.on_first(lambda: two(tmp_path, steps=6, mesh=MeshConfig(dp=2)))
    )
    plain = with_group(plain, "checkpoint", every=1)
    behind = with_group(behind, "checkpoint", every=1, asynchronous=True, host_mib=4)
    run(CPU, plain, silent)
    run(CPU, behind, silent)
    if world.rank:
        return
    found = [steps_in(cfg.checkpoint.dir) for cfg in (plain, behind)]
    assert list(found[0]) == list(found[1]) == [1, 2, 3, 4, 5, 6]
    for step in found[0]:
        for rank in (0, 1):
            file = f"rank_{rank:05d}.bin"
            assert found[0][step].get(file) == found[1][step].get(file)  # type: ignore[attr-defined]
    assert [line["step"] for line in saved_lines(behind)] == [1, 2, 3, 4, 5, 6]
    assert all(0 < line["ms"] <= line["total_ms"] for line in saved_lines(behind))


def test_the_last_the_round_and_the_best_stay(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, steps=7, eval_every=1)
    cfg = with_group(cfg, "checkpoint", every=1, keep_last=2, keep_every=4, keep_best=1)
    run(CPU, cfg, silent)
    told = {
        line["step"]: line["valid_loss"]
        for line in metrics.read(cfg.checkpoint.dir)
        if line["kind"] == "eval"
    }
    best = min(told, key=lambda step: told[step])
    assert list(steps_in(cfg.checkpoint.dir)) == sorted({best, 4, 6, 7})
    removed = [step for line in saved_lines(cfg) for step in line["removed"]]
    assert sorted({*removed, best, 4, 6, 7}) == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_keeps_its_checkpoints_behind_a_url_and_goes_on_from_there(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    cfg = with_group(tiny_run(tmp_path, steps=5), "checkpoint", url=url, asynchronous=True)
    open_job(CPU, cfg, silent).train(stop=3)
    assert str(latest(url)) == f"{url}/step_00000003"
    assert not list((tmp_path / "run").glob("step_*"))
    assert (tmp_path / "run" / "config.json").is_file()
    heard: dict[str, Any] = {}
    assert run(CPU, cfg, lambda kind, fields: heard.update({kind: fields})) == 5
    assert heard["start"]["resumed"] == f"{url}/step_00000003"
    assert list(steps_in(url)) == [2, 3, 4, 5]
    fsspec.filesystem("memory").store.clear()


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, steps=4)
    run(CPU, cfg, silent)
    extra = load_extra(tmp_path / "run" / "step_00000004")
    assert extra.keys() >= {
        "step", "consumed", "data", "samples", "tokenizer", "config", "layout", "rng", "schedule",
        "metrics",
    }  # fmt: skip
    assert extra["rng"] == {"seed": cfg.train.seed, "step": 4}
    assert extra["layout"]["mesh"] == {"pp": 1, "dp": 1, "cp": 1, "ep": 1, "tp": 1}
    assert extra["schedule"]["updates"] == 4
    assert set(extra["metrics"]) == {"loss", "valid_loss"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_ends_the_run_with_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    cfg = tiny_run(tmp_path, steps=8)
    cfg = with_group(cfg, "checkpoint", every=2, asynchronous=asynchronous)
    heard: list[int] = []
    pwrite = os.pwrite

    def full_from_step_4(*args: Any) -> int:
        if heard[-1] >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    def listen(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "step":
            heard.append(fields["step"])

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full_from_step_4)
        with pytest.raises(OSError, match=r"rank_00000\.bin: cannot write its"):
            run(CPU, cfg, listen)
    assert list(steps_in(cfg.checkpoint.dir)) == [2]
    assert heard[-1] <= (6 if asynchronous else 4), "the next save waits for the one before"
    assert run(CPU, cfg, silent) == 8


def test_masters_are_kept_or_dropped_as_the_config_says(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, steps=4)
    narrow = with_group(replace(cfg, dtype="bfloat16"), "checkpoint")
    open_job(CPU, narrow, silent).train(stop=2)
    stored = {x.leaf.path for x in read_manifest(tmp_path / "run" / "step_00000002").leaves}
    assert any(path.startswith("opt.master.") for path in stored)
    heard: dict[str, Any] = {}
    wide = replace(narrow, dtype="float32")
    assert run(CPU, wide, lambda kind, fields: heard.update({kind: fields})) == 4
    assert "are the masters of the checkpoint" in heard["start"]["masters"]


def test_weights_begin_a_run_with_another_head(tmp_path: Path) -> None:
    first, second = two(tmp_path, steps=4)
    run(CPU, first, silent)
    second = with_group(second, "model", vocab_size=520)
    weights = CheckpointConfig(dir=second.checkpoint.dir, weights=first.checkpoint.dir)
    second = replace(second, checkpoint=weights)
    with pytest.raises(ValueError, match=r"a checkpoint of another model: model.vocab_size"):
        open_job(CPU, second, silent)
    heard: dict[str, Any] = {}
    second = with_group(second, "checkpoint", skip=("*table*",))
    job = open_job(CPU, second, lambda kind, fields: heard.update({kind: fields}))
    assert all("table" in path for path in heard["start"]["skipped"])
    assert heard["start"]["changed"]["model.vocab_size"] == [512, 520]
    assert job.progress.state.step == job.progress.consumed == 0


REFUSED = {
    "url without a folder": (
        {"url": "memory://x"},
        "checkpoint.dir: empty, but checkpoint.url is set. Name a folder, or no url.",
    ),
    "a folder that is a URL": (
        {"dir": "s3://bucket/run"},
        "checkpoint.dir: s3://bucket/run is a URL, and metrics.jsonl grows line by line. Name a "
        "folder, and the URL in checkpoint.url.",
    ),
    "skip without weights": (
        {"skip": ("head*",)},
        "checkpoint.skip: head*, but checkpoint.weights is empty: a run that goes on takes all "
        "leaves. Name weights, or leave skip out.",
    ),
    "too little memory": (
        {"host_mib": 1},
        "checkpoint.host_mib: 1 MiB hold no block of 4. Give 4 or more.",
    ),
    "the best of all": (
        {"keep_best": 1},
        "checkpoint.keep_last: 0 keeps all, so keep_every and keep_best change nothing. Set "
        "checkpoint.keep_last to 1 or more.",
    ),
    "less than nothing": (
        {"keep_last": -1},
        "checkpoint: keep_last -1, keep_every 0 and keep_best 0 count checkpoints. Give at least "
        "0.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_contradicts_itself_is_refused(case: str) -> None:
    fields, text = REFUSED[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared whole)
        CheckpointConfig(**fields)  # type: ignore[arg-type]
    assert str(caught.value) == text


def test_the_best_needs_evaluations(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path, eval_every=0)
    with pytest.raises(ValueError, match=r"^checkpoint.keep_best: 1, but train.eval_every is 0"):
        with_group(cfg, "checkpoint", keep_last=1, keep_best=1)
