"""The comparison of layouts with one rank sees a gradient that is not summed, and says so."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks import multi_gpu
from benchmarks.apart import apart
from benchmarks.multi_gpu_cases import (
    Cut,
    dimensions,
    exact_config,
    mixed_cuts,
    mixes,
    speed_cuts,
)
from benchmarks.multi_gpu_exactness import compare, reference, wrong
from benchmarks.multi_gpu_speed import collectives
from megatree.recipes.config import MeshConfig, RunConfig
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.time_table import WINDOW
from tests.ranks import ranks

CPU = torch.device("cpu")


def short(cut: Cut) -> RunConfig:
    """Return an exact run of 2 ranks with 2 layers and 2 microbatches."""
    cfg = exact_config(cut, 2, "tiny")
    train = replace(cfg.train, global_batch=4, microbatch=2)
    return replace(cfg, model=replace(cfg.model, num_layers=2, seq_length=16), train=train)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A step on one device, which equals the model's fold under torch alone."""
    path = str(tmp_path / "reference")
    row = reference(CPU, short(Cut(mesh=MeshConfig())), path)
    assert not wrong(row), row
    return path


@ranks(2)
def test_a_step_on_two_ranks_is_exact_and_a_lost_sum_is_seen(file: str) -> None:
    cfg = short(dimensions(2)["dp, ZeRO-1"])
    row = compare(CPU, cfg, file)
    assert not wrong(row), row
    assert 0 < row["grads"] < 1e-5
    assert len(row["leaves"]) == 12

    def own_part(self: ProcessComm, x: torch.Tensor, axes: Any) -> Any:
        part = x.chunk(self.size(axes))[self.index(axes)].clone()
        return lambda: part

    with patch.object(ProcessComm, "psum_scatter_async", own_part):
        broken = compare(CPU, cfg, file)
    assert wrong(broken).startswith("grads ("), broken
    assert broken["grads"] > 0.1
    assert broken["loss"] == row["loss"]


def test_what_is_wrong_with_a_row_is_said() -> None:
    good: dict[str, Any] = {
        "loss": 1e-8, "norm": 1e-5, "after": 1e-7, "grads": 2e-6, "worst": "w", "missing": [],
        "moved": 0,
    }  # fmt: skip
    assert wrong(good) == ""
    assert wrong({**good, "grads": 2e-5}) == "grads (w) off by 2e-05, allowed 1e-05"
    assert "loss off by nan" in wrong({**good, "loss": math.nan})
    assert wrong({**good, "missing": ["v"]}) == "no rank has the gradients of v"
    assert "3 tokens went to other experts" in wrong({**good, "after": 1.0, "moved": 3})
    assert wrong({"error": "it hangs"}) == "it hangs"


@pytest.mark.parametrize("n", [2, 4, 8])
def test_layouts_fill_the_ranks(n: int) -> None:
    mixed = mixes(n)
    assert len(mixed) == {2: 0, 4: 8, 8: 12}[n]
    for cut in [*dimensions(n).values(), *mixed.values(), *speed_cuts(n).values(), *mixed_cuts(n)]:
        assert cut.mesh.num_ranks == n
    for cut in [*dimensions(n).values(), *mixed.values()]:
        cfg = exact_config(cut, n, "small")
        assert cfg.dtype == "float32"
        assert cfg.precision.matmul == "highest"


def test_a_run_that_hangs_ends_and_says_so() -> None:
    out = apart(compare, 1, limit_s=0.5, device="cpu")
    assert out.value is None
    assert out.error == "no result within 0.5 s: hangs or is too slow"
    assert out.seconds < 5.0


def test_communication_is_told_apart_by_collective() -> None:
    """Hidden is what lies under a product; each collective is taken by itself."""

    def event(name: str, start: float, end: float, cat: str = "kernel") -> dict[str, Any]:
        return {
            "ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "pid": 0,
            "tid": name,
        }  # fmt: skip

    trace = {
        "traceEvents": [
            event(WINDOW, 0, 10_000, "user_annotation"),
            event("nvjet_gemm", 0, 4_000),
            event("ncclDevKernel_AllGather_RING_LL", 3_000, 6_000),
            event("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 5_000, 8_000),
        ]
    }
    assert collectives(trace, "cuda", 1) == {
        "all": {"exposed_ms": 4.0, "hidden_ms": 1.0},
        "all-gather": {"exposed_ms": 2.0, "hidden_ms": 1.0},
        "reduce-scatter": {"exposed_ms": 3.0, "hidden_ms": 0.0},
    }


def test_missed_targets_are_told() -> None:
    row: dict[str, Any] = {
        "part": "scaling", "model": "llama-7b", "layout": "dp, ZeRO-1", "ranks": 8, "card": "GPU",
        "efficiency": 0.96, "time_of_plan": 1.05, "memory_of_plan": 0.95, "mfu": 0.5,
    }  # fmt: skip
    assert multi_gpu.misses([row]) == []
    slow = {**row, "efficiency": 0.9, "time_of_plan": 1.2, "mfu": 0.4}
    assert multi_gpu.misses([slow]) == [
        "llama-7b on 8: dp, ZeRO-1: 90.0% of one rank's rate, target 95%",
        "llama-7b on 8: dp, ZeRO-1: time is 1.20 of the plan's",
        "llama-7b: MFU 40.0% at most; Megatron-LM, 7.1 B at tp 2, H100: 47%",
    ]
    assert multi_gpu.misses([{**slow, "card": "cpu"}, {**row, "error": "it hangs"}]) == []
