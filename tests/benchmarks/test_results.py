"""The README shows the results that are kept, and nothing else."""

import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import (
    MULTI_GPU_KEYS,
    README,
    gpu_table,
    multi_gpu_table,
    read,
    with_tables,
)


def test_the_readme_has_the_table_of_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run python -m benchmarks.results --write"


def test_the_last_result_of_a_row_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "row": "megatree", "model": "m", "attention": "fa4", "sequences": 8, "step_ms": 20.0,
        "tokens_per_s": 1000.0, "mfu": 0.5, "peak_gib": 1.0, "first_step_s": 2.0, "of_control": 1.1,
        "card": "a card", "torch": "2.11", "date": "2026-01-01", "commit": "abc",
    }  # fmt: skip
    rows = [{**row, "step_ms": 30.0}, row, {**row, "row": "control", "of_control": None}]
    (tmp_path / "gpu.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    lines = gpu_table(read("gpu.jsonl")).splitlines()
    assert lines[2] == "| m | megatree, FA4 | 20.0 | 1,000 | 50.0% | 1.0 | 2.0 | 1.100 |"
    assert [line.split("|")[-2].strip() for line in lines[2:4]] == ["1.100", ""]
    assert lines[-1] == "a card, torch 2.11, 2026-01-01; commit abc."
    with pytest.raises(ValueError, match="has no <!-- gpu results -->"):
        with_tables("a README without marks")


def test_several_gpus_are_a_line_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of CPUs and failed runs make no table; there is none without rows."""
    facts = {"card": "a card", "torch": "2.11", "date": "2026-01-01", "commit": "abc"}
    exact = {
        "part": "exactness", "model": "small", "layout": "dp", "ranks": 8, "loss": 1e-8,
        "grads": 2e-6, "wrong": "", **facts,
    }  # fmt: skip
    scaling = {
        "part": "scaling", "model": "m", "layout": "FSDP", "ranks": 8, "mesh": "dp=8 tp=1",
        "layers": 4, "tokens_per_s_per_rank": 1234.5, "mfu": 0.5, "peak_bytes": 2**31,
        "efficiency": 0.97, "time_of_plan": 1.05, "memory_of_plan": 0.9, "published": "theirs",
        "published_mfu": 0.47, **facts,
    }  # fmt: skip
    overlap = {
        "part": "overlap", "model": "m", "layout": "FSDP", "ranks": 8,
        "collectives": {"all": {"hidden_ms": 9.0, "exposed_ms": 1.0}}, **facts,
    }  # fmt: skip
    failed = {**scaling, "layout": "tp, sp", "error": "no result within 1 s"}
    rows = [exact, {**exact, "layout": "tp", "wrong": "loss off"}, scaling, overlap, failed]
    (tmp_path / "multi_gpu.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    lines = multi_gpu_table(read("multi_gpu.jsonl", MULTI_GPU_KEYS)).splitlines()
    assert lines[0] == (
        "One step in float32 under 1 of 2 layouts of 8 GPUs equals that of one: loss within 1e-08, "
        "gradients of every leaf within 2e-06."
    )
    assert lines[4] == (
        "| m | 8 | FSDP | dp=8 tp=1 | 1,234 | 50.0% | 2.0 | 97.0% | 1.05, 0.90 | 90% of 10.0 ms |"
    )
    assert lines[5:] == [
        "", "Published: theirs: 47% MFU.", "a card, torch 2.11, 2026-01-01; commit abc."
    ]  # fmt: skip
    assert multi_gpu_table([{**row, "card": "cpu"} for row in rows]) == "Not measured yet.\n"
