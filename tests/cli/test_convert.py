"""`megatree convert`, `inspect` and `verify`: what a user sees, and exit codes."""

import re
from pathlib import Path

import pytest
import torch

from megatree.cli.main import main
from megatree.io.checkpoint import Piece, save
from megatree.io.world import World

STORIES = "data/weights/stories260K/hf"


def test_a_real_model_goes_through_all_commands(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run, back = str(shared / STORIES), str(tmp_path / "run"), str(tmp_path / "back")
    assert main(["convert", source, run, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "(kv_heads group head_dim) embed" in shown
    assert "model.layers.{layer}.self_attn.q_proj.weight" in shown
    assert "11 leaves, 11 arrays, 1.0 MB would be written" in shown
    assert list(tmp_path.iterdir()) == []
    assert main(["convert", source, run]) == 0
    assert f"wrote {run}: 11 arrays, 1.0 MB, megatree" in capsys.readouterr().out
    assert main(["convert", run, back, "--from", "megatree", "--to", "hf"]) == 0
    assert "47 arrays" in capsys.readouterr().out
    assert main(["inspect", run]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"params.blocks.dense.wq +layers kv_heads group head_dim embed +float32", shown
    )
    assert "[0:5, 0:4, 0:2, 0:8, 0:64] rank_00000.bin" in shown
    assert main(["verify", run]) == 0
    assert "11 arrays, 1.0 MB read, checksums hold" in capsys.readouterr().out
    assert main(["inspect", run, "--against", back]) == 0
    assert "0 of 11 leaves differ" in capsys.readouterr().out
    prompt = ["--prompt", "Once upon a time", "--max-tokens", "5"]
    assert main(["generate", "--checkpoint", run, *prompt]) == 0
    assert "Once upon a time, there was a" in capsys.readouterr().out


def test_the_difference_of_two_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value, more in (("a", 1.0, ["only"]), ("b", 1.5, [])):
        pieces = [Piece.whole("params.w", torch.tensor([1.0, value, 3.0]), "embed")]
        pieces += [Piece.whole(path, torch.ones(1), "embed") for path in more]
        save(tmp_path / name, pieces, world=World.single())
    assert main(["inspect", str(tmp_path / "a"), "--against", str(tmp_path / "b")]) == 1
    shown = capsys.readouterr().out
    assert "only: only in the first" in shown
    assert "params.w: 1 of 3 elements differ, by 0.5 at most" in shown
    assert "2 of 2 leaves differ" in shown


def test_a_dry_run_says_where_every_leaf_goes_and_fails_if_one_goes_nowhere(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(shared / "goldens/checkpoints/llama_tp2_mcore0192")
    there = str(tmp_path / "x")
    assert main(["convert", source, there, "--to", "torch_dist", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"opt\.v\.blocks\.dense\.w_down +layers ffn embed +float32 +"
        r"optimizer\.state\.exp_avg_sq\.decoder\.layers\.mlp\.linear_fc2\.weight +layers emb",
        shown,
    )
    assert "left out: optimizer.state.param.output_layer.weight (copies of float32" in shown
    assert main(["convert", source, there, "--to", "hf", "--dry-run"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"opt\.m\.head\.norm +embed +float32 +-", shown)
    assert "unmapped: opt.m.head.norm has no place in the target" in shown
    assert main(["convert", source, there, "--to", "hf", "--weights-only", "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_damage_and_what_has_no_place_end_with_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "step_00000001"
    save(run, [Piece.whole("params.w", torch.ones(9), "embed")], world=World.single())
    file = run / "rank_00000.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert main(["verify", str(run)]) == 1
    told = capsys.readouterr()
    assert "1 of 1 arrays are damaged" in told.out
    assert "params.w: rank_00000.bin bytes 0 to 36" in told.err
    assert main(["convert", str(run), str(tmp_path / "x"), "--to", "hf"]) == 2
    assert "does not say what model it is of" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "gone"), str(tmp_path / "x")]) == 2
    assert "gone: no folder" in capsys.readouterr().err
    assert main(["convert", str(run), str(tmp_path / "x"), "--to", "dcp", "--tensor", "2"]) == 2
    assert "--tensor and --pipeline are of --to megatron" in capsys.readouterr().err
