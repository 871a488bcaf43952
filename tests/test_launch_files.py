"""The launch files start what they say: run dry, with programs in place of SLURM's and torchrun."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatree.cli.main import main

LAUNCH = Path(__file__).parents[1] / "examples" / "launch"
RECORD = f"""#!{sys.executable}
import json, os, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["RECORD"], "a") as stream:
    stream.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "srun":
    at = next(i for i, arg in enumerate(sys.argv) if i and not arg.startswith("-"))
    os.execvp(sys.argv[at], sys.argv[at:])
if name == "scontrol":
    print("node-a\\nnode-b")
if name == "nvidia-smi":
    print("GPU 0\\nGPU 1")
"""


def dry_run(file: str, folder: Path, *args: str, **env: str) -> list[list[str]]:
    """Run a launch file; return the commands that it ran, in order."""
    for name in ("torchrun", "srun", "scontrol", "nvidia-smi"):
        (folder / name).write_text(RECORD)
        (folder / name).chmod(0o755)
    record = folder / "commands.jsonl"
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(LAUNCH / file), *args],
        env={"PATH": path, "RECORD": str(record), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in record.read_text().splitlines()]


@pytest.mark.parametrize("file", ["torchrun.sh", "slurm.sbatch"])
def test_a_launch_file_is_a_program_that_bash_reads(file: str) -> None:
    assert (LAUNCH / file).stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(LAUNCH / file)], check=True, timeout=60)


def test_torchrun_starts_a_rank_per_gpu_of_every_node(tmp_path: Path) -> None:
    one = dry_run("torchrun.sh", tmp_path, "demo", "--train.steps", "3")[-1]
    assert one == [
        "torchrun", "--nnodes", "1", "--nproc-per-node", "2", "--standalone",
        "-m", "megatree.cli", "train", "demo", "--train.steps", "3",
    ]  # fmt: skip
    two = dry_run("torchrun.sh", tmp_path, "demo", NODES="2", GPUS="8", NODE_RANK="1", HEAD="a")[-1]
    assert two[:10] == [
        "torchrun", "--nnodes", "2", "--nproc-per-node", "8", "--node-rank", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint",
    ]  # fmt: skip
    assert two[10] == "a:29500"


def test_slurm_starts_torchrun_once_per_node(tmp_path: Path) -> None:
    commands = dry_run(
        "slurm.sbatch", tmp_path, "gpt3-175b",
        SLURM_JOB_NODELIST="node-[a-b]", SLURM_NNODES="128", SLURM_JOB_ID="7",
    )  # fmt: skip
    assert [command[0] for command in commands] == ["scontrol", "srun", "torchrun"]
    torchrun = commands[-1]
    assert torchrun[torchrun.index("--rdzv-endpoint") + 1] == "node-a:29500"
    nodes, gpus = (
        int(torchrun[torchrun.index(flag) + 1]) for flag in ("--nnodes", "--nproc-per-node")
    )
    recipe = torchrun[torchrun.index("train") + 1]
    from megatree.recipes.presets import RECIPES

    assert nodes * gpus == RECIPES[recipe]().mesh.num_ranks == 1024


def test_the_command_that_the_files_start_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "gpt3-175b", "--help"])
    assert end.value.code in (0, None)
    assert "--storage.zero" in capsys.readouterr().out
