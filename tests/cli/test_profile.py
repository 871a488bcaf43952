"""`megatree train --profile` as a user types it: a trace that loads, a table that adds up."""

import json
import re
from pathlib import Path

import pytest

from megatree.cli.main import main
from megatree.cli.progress import show
from megatree.recipes import metrics
from megatree.recipes.config import MeshConfig
from megatree.recipes.profile_config import ProfileConfig
from megatree.runtime.time_table import WINDOW
from tests.cli.test_train import saved

ROW = re.compile(r"  (\S+) +([\d,.]+) +(\d+\.\d)% +(n/a|[\d,.]+)")


def test_the_demo_profiled_writes_a_trace_and_says_where_the_time_went(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    one = ["--mesh.tp", "1", "--rules.seq-res", "--train.steps", "4", "--train.eval-every", "0"]
    where = ["--checkpoint.dir", str(run), "--checkpoint.every", "0"]
    assert main(["train", "demo", *one, *where, "--profile", "--profile-steps", "1:3"]) == 0
    out, _ = capfd.readouterr()

    (told,) = [line for line in metrics.read(str(run)) if line["kind"] == "profile"]
    file = run / "profile" / "steps_1_3_rank_0.json"
    assert (told["step"], told["num_steps"], told["trace"]) == (3, 2, str(file))
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    names = {event["name"] for event in events}
    assert {WINDOW, "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= names

    shares = {row["kind"]: row["share"] for row in told["rows"]}
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-9)
    assert {"GEMM", "attention", "loss", "optimizer", "norm/elementwise", "idle"} <= shares.keys()
    # Two steps of this model are products first of all, and each kind takes some time.
    assert shares["GEMM"] == max(shares[kind] for kind in shares if kind != "idle")
    assert min(shares.values()) > 0
    total = sum(row["ms"] for row in told["rows"])
    assert total == pytest.approx(told["step_ms"], rel=1e-9)

    printed = {match[1]: match for line in out.splitlines() if (match := ROW.fullmatch(line[:48]))}
    assert printed.keys() == shares.keys()
    assert sum(float(match[3]) for match in printed.values()) == pytest.approx(100.0, abs=0.5)
    assert {match[4] for match in printed.values()} == {"n/a"}, "a CPU has no ceilings"


def test_ranks_write_a_trace_each_and_messages_are_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = saved(tmp_path, steps=3, eval_every=0, mesh=MeshConfig(tp=2))
    assert main(["train", recipe, "--profile", "--profile-steps", "1:2"]) == 0
    files = sorted(path.name for path in (tmp_path / "run" / "profile").iterdir())
    assert files == ["steps_1_2_rank_0.json", "steps_1_2_rank_1.json"]
    (told,) = [line for line in metrics.read(str(tmp_path / "run")) if line["kind"] == "profile"]
    shares = {row["kind"]: row["share"] for row in told["rows"]}
    assert shares["communication"] > 0.05
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-9)


def test_the_largest_loss_is_marked(capfd: pytest.CaptureFixture[str]) -> None:
    def row(kind: str, ms: float, ceiling: float | None) -> dict[str, object]:
        fields = {"kind": kind, "ms": ms, "share": ms / 100, "hidden_ms": 0.0}
        return {**fields, "ceiling_ms": ceiling}

    rows = [row("GEMM", 60.0, 55.0), row("attention", 25.0, 10.0), row("copy", 11.0, None)]
    rows.append(row("idle", 4.0, None))
    fields = {"step": 13, "trace": "t.json", "num_steps": 3, "step_ms": 100.0, "rows": rows}
    show("profile", fields)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "step     13  profile of 3 steps, 100.00 ms each: t.json"
    assert lines[2].split() == ["GEMM", "60.00", "60.0%", "55.00", "5.00"]
    assert lines[3].split()[:5] == ["attention", "25.00", "25.0%", "10.00", "15.00"]
    assert [line.endswith("<- the largest loss") for line in lines[2:]] == [0, 1, 0, 0]
    assert lines[4].split() == ["copy", "11.00", "11.0%", "n/a", "n/a"]
    assert lines[5].split() == ["idle", "4.00", "4.0%", "n/a", "4.00"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--profile"],
            "profile.steps: 10:13, but this run makes 4 steps. Raise train.steps, or set "
            "--profile-steps to 1:4.",
        ),
        (
            ["--profile", "--profile-steps", "0:2"],
            "profile.steps: '0:2' are no steps. Give first:stop, as 10:13 for three steps; step 0 "
            "compiles, so the first is at least 1.",
        ),
        (
            ["--profile-steps", "1:2"],
            "--profile-steps, --profile-dir: they say how to profile, and --profile is not given. "
            "Add --profile, or leave them out.",
        ),
    ],
)
def test_steps_that_are_not_made_are_refused_before_the_first(
    words: list[str], text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", saved(tmp_path), *words]) == 2
    out, err = capfd.readouterr()
    assert err == f"megatree: {text}\n"
    assert "step      1" not in out


def test_a_run_that_goes_on_counts_from_where_it_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = saved(tmp_path, steps=2, eval_every=0)
    assert main(["train", recipe]) == 0
    words = ["--train.steps", "4", "--profile", "--profile-steps", "1:2"]
    assert main(["train", recipe, *words, "--profile-dir", str(tmp_path / "traces")]) == 0
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["steps_3_4_rank_0.json"]
    assert "step      4  profile of 1 steps" in capfd.readouterr().out


def test_compiled_mode_without_a_compiler_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["train", saved(tmp_path), "--compile"]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("megatree: compile: torch.compile builds C++ on cpu, and no C++ compiler")
    assert "Traceback" not in err
    assert out == ""


def test_steps_are_read() -> None:
    assert ProfileConfig().range == (10, 13)
    assert ProfileConfig(steps="3:4").range == (3, 4)
