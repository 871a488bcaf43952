"""Pipelines on the command line: drawn, and refused before any process starts."""

from pathlib import Path

import pytest

from megatree.cli.main import main
from megatree.runtime import processes

STAGES = ["--mesh.tp", "1", "--rules.seq-res", "--train.microbatch", "4"]


def test_plan_draws_the_timeline_as_text_and_as_a_picture(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "timeline.png"
    options = [*STAGES, "--mesh.pp", "4", "--train.global-batch", "32"]
    assert main(["plan", "demo", *options, "--schedule", "zb-h1", "--plot", str(file)]) == 0
    out = capsys.readouterr().out
    assert "rank 3 |.. .. .. F0 B0 F1 B1 F2 B2 F3 B3 W0 F4" in out
    assert "8 microbatches: makespan 27, bubble 11.1%, live microbatches at most 4" in out
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--mesh.pp", "8", "--train.global-batch", "32"],
            "placement: 4 layers over 8 stages leaves a stage without layers "
            "([1, 1, 1, 1, 0, 0, 0, 0]). Use at most 4 stages, or give layers_per_stage.\n"
            "  stage 0 |  layer 0\n",
        ),
        (
            ["--mesh.pp", "2", "--train.global-batch", "4", "--pipeline.schedule", "interleaved",
             "--pipeline.virtual", "2"],
            "interleaved: 1 microbatches for 2 ranks. Use at least 2 microbatches, or one_f_one_b, "
            "which takes any count.\n  group 0 |  0  [?]\n",
        ),
    ],
)  # fmt: skip
def test_train_refuses_before_any_process_starts(
    options: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def started(*args: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(processes.multiprocessing, "get_context", started)
    assert main(["train", "demo", *STAGES, *options]) == 2
    assert text in capsys.readouterr().err
