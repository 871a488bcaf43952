"""The README shows the results that are kept, and nothing else."""

import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import README, gpu_table, read, with_tables


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
