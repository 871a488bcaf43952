"""Training, going on and generating as a user types it."""

import re
from pathlib import Path

import pytest

from megatree.cli.main import main
from megatree.cli.progress import show
from megatree.io.checkpoint import load_extra
from megatree.io.tokenizers import identity_beside
from megatree.recipes import metrics
from megatree.recipes.config import MeshConfig
from megatree.recipes.saved import to_json
from megatree.runtime.processes import RankFailed
from tests.recipes.tiny_run import tiny_run

LINE = re.compile(
    r"step +(\d+)  loss (\d+\.\d{4})  grad norm +\d+\.\d{3}  lr \d\.\d\de-\d\d  "
    r" *[\d,]+ tokens/s  +[\d,]+ ms"
)


def saved(folder: Path, **fields: object) -> str:
    """Write a tiny config; return its file."""
    path = folder / "tiny.json"
    path.write_text(to_json(tiny_run(folder, **fields)), encoding="utf-8")  # type: ignore[arg-type]
    return str(path)


def test_a_run_on_two_processes_goes_on_in_one_and_generates(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = saved(tmp_path, steps=3, mesh=MeshConfig(tp=2))
    assert main(["train", recipe]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "0.02 M parameters in float32 on dp=1 tp=2 (2 processes, cpu)"
    assert "16 tokens" in lines[1]
    assert "64 tokens per step" in lines[1]
    found = [match for line in lines if (match := LINE.fullmatch(line))]
    assert [match[1] for match in found] == ["1", "2", "3"]
    told = metrics.read(str(tmp_path / "run"))
    losses = {line["step"]: line["loss"] for line in told if "loss" in line}
    assert [match[2] for match in found] == [f"{losses[step]:.4f}" for step in (1, 2, 3)]
    assert sum("held-out loss" in line for line in lines) == 2

    run = str(tmp_path / "run" / "config.json")
    assert main(["train", run, "--mesh.tp", "1", "--rules.seq-res", "--train.steps", "4"]) == 0
    out, _ = capfd.readouterr()
    assert f"goes on from {tmp_path}/run/step_00000003" in out
    changes = ("mesh.tp: 1 (was 2)", "rules.seq_res: (none) (was cp tp)", "train.steps: 4 (was 3)")
    assert [change in out for change in changes] == [True] * 3
    assert [match[1] for match in LINE.finditer(out)] == ["4"]

    assert main(["train", run, "--mesh.tp", "1", "--rules.seq-res", "--train.steps", "4"]) == 0
    out, _ = capfd.readouterr()
    assert "is at step 4 of 4 already: nothing left to do" in out
    assert LINE.search(out) is None

    texts = []
    for draw in ([], ["--temperature", "1", "--seed", "4"], ["--temperature", "1", "--seed", "5"]):
        words = ["--prompt", "the cat", "--prompt", "", "--max-tokens", "8", *draw]
        assert main(["generate", "--checkpoint", str(tmp_path / "run"), *words]) == 0
        texts.append(capfd.readouterr().out)
    assert all(text.startswith("the cat") for text in texts)
    assert len(set(texts)) == 3


def test_what_only_the_ranks_can_see_is_refused_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = saved(tmp_path, mesh=MeshConfig(dp=2))
    assert main(["train", recipe, "--model.vocab-size", "300"]) == 2
    out, err = capfd.readouterr()
    assert re.fullmatch(
        r"megatree: (rank 0: )?model.vocab_size: 300, but the tokenizer has 512 entries\. "
        r"Set model.vocab_size to 512, or use a smaller tokenizer\.\n",
        err,
    )
    assert out == ""


def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = saved(tmp_path, steps=1)
    assert main(["train", recipe]) == 0
    capfd.readouterr()
    assert main(["train", recipe, "--model.ffn", "32"]) == 2
    _, err = capfd.readouterr()
    place = f"{tmp_path}/run/step_00000001"
    assert err.startswith(f"megatree: {place}: a checkpoint of another model: ")
    assert "model.ffn is 24 there and 32 here" in err
    assert main(["generate", "--checkpoint", f"{tmp_path}/run", "--prompt", "a" * 9]) == 2
    _, err = capfd.readouterr()
    assert "the model's sequence has 16. Ask for at most" in err


def test_the_failure_of_a_rank_is_its_traceback_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "rank 1 of 2 failed first:\nTraceback (most recent call last):\nKeyError: 'a bug'"

    def fails(args: list[str]) -> int:
        raise RankFailed(text)

    monkeypatch.setattr("megatree.cli.train.main", fails)
    assert main(["train", "demo"]) == 1
    assert capfd.readouterr().err == f"megatree: {text}\n"


def test_an_interrupt_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatree.cli.train.main", interrupted)
    assert main(["train", "demo"]) == 130
    assert capfd.readouterr().err == "megatree: interrupted\n"


def test_brackets_in_a_path_are_no_markup(capfd: pytest.CaptureFixture[str]) -> None:
    show("saved", {"step": 1, "path": "runs/[bold]x[/]", "ms": 1.0})
    assert "saved runs/[bold]x[/]" in capfd.readouterr().out


def test_text_becomes_files_and_files_a_run_that_generates(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The way of a user with a text of their own, command by command."""
    recipe = saved(tmp_path, steps=2)
    text, tok = str(tmp_path / "text.jsonl"), str(tmp_path / "tok")
    assert main(["data", "train-tokenizer", text, "--output", tok, "--vocab-size", "280"]) == 0
    made = ["--output-prefix", str(tmp_path / "a"), "--append-eod", "--workers", "1"]
    kind = ["--tokenizer.kind", "hf", "--tokenizer.path", tok]
    assert main(["data", "preprocess", text, *made, *kind]) == 0
    prefix = str(tmp_path / "a_text_document")
    options = ["--data.text=", "--data.tokenizer=", "--data.split", "1,1", "--data.reset-attention"]
    assert main(["train", recipe, "--data.prefix", prefix, *options]) == 0
    out, _ = capfd.readouterr()
    assert "saved" in out
    extra = load_extra(tmp_path / "run" / "step_00000002")
    assert extra["tokenizer"] == identity_beside(prefix)
    assert (extra["consumed"], extra["samples"]) == (8, 8)
    words = ["--prompt", "the cat", "--max-tokens", "4"]
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), *words]) == 0
    assert capfd.readouterr().out.startswith("the cat")
