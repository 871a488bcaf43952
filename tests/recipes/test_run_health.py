"""A run is looked after: same bits twice, a checkpoint on a signal, and what is odd is told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.io.checkpoint import latest
from megatree.recipes import metrics
from megatree.recipes.config import MeshConfig, RunConfig
from megatree.recipes.job import open_job, run
from megatree.recipes.saved import to_json
from megatree.recipes.start import start
from megatree.runtime import pieces
from megatree.runtime.processes import RankFailed, world_of_group
from tests.ranks import ranks
from tests.recipes.tiny_run import tiny_run, with_group

CPU = torch.device("cpu")


def silent(kind: str, fields: Mapping[str, Any]) -> None:
    """Report nothing."""


def files(folder: Path) -> dict[str, bytes]:
    """Return name -> content of a checkpoint's files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Return (step, loss, gradient norm) of every step."""
    lines = metrics.read(str(folder))
    return [(x["step"], x["loss"], x["grad_norm"]) for x in lines if x["kind"] == "step"]


def test_two_deterministic_runs_are_equal_to_the_byte(tmp_path: Path) -> None:
    cfg = replace(tiny_run(tmp_path, steps=4), deterministic=True)
    folder, first = tmp_path / "run", tmp_path / "first"
    modes: set[bool] = set()
    run(CPU, cfg, lambda kind, fields: modes.add(torch.are_deterministic_algorithms_enabled()))
    assert modes == {True}
    folder.rename(first)
    run(CPU, cfg, silent)
    assert not torch.are_deterministic_algorithms_enabled()
    assert losses(folder) == losses(first)
    for name in ("step_00000002", "step_00000004"):
        assert files(folder / name) == files(first / name)


def test_a_deterministic_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    cfg = replace(tiny_run(tmp_path, steps=4), deterministic=True)
    cfg = with_group(cfg, "health", spike_factor=50.0, spike_window=3)
    folder, first = tmp_path / "run", tmp_path / "first"
    run(CPU, cfg, silent)
    folder.rename(first)
    open_job(CPU, cfg, silent).train(stop=2)
    run(CPU, cfg, silent)
    assert files(folder / "step_00000004") == files(first / "step_00000004")
    assert losses(folder) == losses(first)


def shared_run(folder: Path, **fields: Any) -> RunConfig:
    """Return one config for all ranks, its text written once."""
    world = world_of_group()
    return world.broadcast(world.on_first(lambda: tiny_run(folder, **fields)))


@pytest.mark.full
@ranks(2)
def test_drift_ends_a_run(tmp_path: Path) -> None:
    cfg = with_group(shared_run(tmp_path, mesh=MeshConfig(dp=2)), "health", invariant_every=2)

    def report(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "step" and fields["step"] == 1:  # on rank 0 alone
            buffer = next(iter(job.step.gradients.weights.stored.values()))
            buffer.detach().view(-1).view(torch.int32)[0] ^= 1 << 20

    job = open_job(CPU, cfg, report)
    with pytest.raises(ValueError, match=r"step 2: params\.\S+.* drifted: .* on rank [01]"):
        job.train()
    assert not list((tmp_path / "run").glob("step_*")), "what drifted is not saved"


@ranks(2)
def test_a_signal_on_one_rank_stops_all_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is asked during its second step; both are asked again while they save."""
    cfg = shared_run(tmp_path, steps=50, mesh=MeshConfig(dp=2), eval_every=0)
    cfg = with_group(cfg, "checkpoint", every=0)
    rank, heard = world_of_group().rank, []
    job = open_job(CPU, cfg, lambda kind, fields: heard.append((kind, fields["step"])))
    plain, steps = pieces.save, iter(range(50))
    evaluate = type(job.step).__call__

    def stepping(*args: Any, **options: Any) -> Any:
        if next(steps) == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    def saving(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        plain(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(type(job.step), "__call__", stepping)
    monkeypatch.setattr(pieces, "save", saving)
    ended = job.train()
    assert ended.progress.state.step == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if rank == 0:
        assert heard[-2:] == [("saved", 2), ("stopped", 2)]
        last = latest(tmp_path / "run")
        assert last is not None
        assert last.name == "step_00000002"
    monkeypatch.undo()
    again = open_job(CPU, cfg, silent)
    assert again.progress.state.step == 2
    assert again.progress.consumed == 8
    assert again.train(stop=3).progress.state.step == 3


def test_updates_that_are_not_finite_are_skipped_and_told(tmp_path: Path) -> None:
    cfg = with_group(tiny_run(tmp_path, steps=9, eval_every=0), "optimizer", lr=1e30)
    cfg = with_group(cfg, "health", nonfinite="skip", max_skips=2)
    heard: list[tuple[str, Mapping[str, Any]]] = []
    with pytest.raises(ValueError, match=r"gradients nan: \S+ .* holds .*, 3 in a row\. Lower"):
        run(CPU, cfg, lambda kind, fields: heard.append((kind, fields)))
    told = [fields["text"] for kind, fields in heard if kind == "odd"]
    assert [text.rsplit(", ", 1)[1] for text in told] == ["1 in a row", "2 in a row"]
    kept = metrics.read(cfg.checkpoint.dir)
    last = [line for line in kept if line["kind"] == "step"][-1]
    assert last["grad_norm"] is None, "JSON has no NaN"
    assert last["skipped"] == 2


def test_numbers_of_a_step(tmp_path: Path) -> None:
    cfg = with_group(tiny_run(tmp_path, steps=3, eval_every=0), "log", peak_flops=1e9)
    run(CPU, cfg, silent)
    line = next(x for x in metrics.read(cfg.checkpoint.dir) if x["kind"] == "step")
    assert sum(line["terms"].values()) == pytest.approx(line["loss"])
    assert line["mfu"] == pytest.approx(line["model_flops_per_s"] / 1e9)
    assert line["memory_bytes"] > 50 << 20
    assert line["skipped"] == 0
    assert line["loss_scale"] == 1.0


def _sleeps(kind: str, fields: Mapping[str, Any]) -> None:
    if kind == "step" and fields["step"] == 2:  # on rank 0 alone
        time.sleep(60.0)


@pytest.mark.full
def test_a_run_that_hangs_ends_with_a_report(tmp_path: Path) -> None:
    cfg = with_group(tiny_run(tmp_path, mesh=MeshConfig(tp=2)), "health", hang_s=2.0)
    with pytest.raises(RankFailed, match="hang: rank 1 has waited") as caught:
        start(run, cfg.mesh, cfg, _sleeps)
    text = caught.value.refusal
    assert text is not None
    assert "rank 0: waits for nobody, is at recipes/test_run_health.py:" in text
    assert "rank 1: waits in " in text


def until(process: subprocess.Popen[str], path: Path, text: str, seconds: float) -> None:
    """Wait for a text in a file that a process writes."""
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.05)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], RunConfig]]:
    """Start `megatree train` on two ranks, in a process group of its own."""
    cfg = tiny_run(tmp_path, steps=100_000, mesh=MeshConfig(dp=2), eval_every=0)
    cfg = with_group(cfg, "checkpoint", every=0)
    (tmp_path / "config.json").write_text(to_json(cfg))
    program = [sys.executable, "-m", "megatree.cli", "train", str(tmp_path / "config.json")]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        program,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield process, cfg
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.full
@pytest.mark.parametrize("whom", ["launcher", "all"])
def test_sigterm_ends_the_command_with_a_checkpoint(
    command: tuple[subprocess.Popen[str], RunConfig], whom: str
) -> None:
    """As a scheduler does it: to the process it started, or to all; and once more soon after."""
    process, cfg = command
    folder = Path(cfg.checkpoint.dir)
    until(process, folder / metrics.METRICS_FILE, '"step": 3,', 60.0)
    for _ in range(2):
        if whom == "all":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        time.sleep(0.02)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    told = metrics.read(str(folder))
    assert [line["kind"] for line in told[-2:]] == ["saved", "stopped"]
    last = latest(folder)
    assert last is not None
    assert last.name == f"step_{told[-1]['step']:08d}"
    assert "asked to stop" in out
