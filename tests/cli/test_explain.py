"""`megatree explain --against-jax`: our collectives beside XLA's, from a JAX that starts there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_JAX = "import sys; sys.modules['jax'] = None"


def explained(first: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a new process: JAX takes its number of devices when it starts."""
    code = f"{first}\nimport sys\nfrom megatree.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "explain", "demo", "--against-jax"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_collectives_of_xla_are_printed_beside_ours() -> None:
    """Nothing else is said: XLA's warnings about the machine would bury the table."""
    pytest.importorskip("jax")
    ran = explained()
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    at = lines.index("blocks.dense on dp=1 tp=2: megatree | XLA")
    ours, theirs = lines[at + 1].removeprefix("  forward   ").split(" | ")
    assert ours == "2 all_gather(tp) + 2 psum_scatter(tp) [4,096 KiB]"
    assert "all_gather(tp)" in theirs
    assert "KiB]" in theirs
    assert any(line.startswith("    models/gpt.py:") for line in lines[at:])
    assert lines[-1].startswith("On a CPU, XLA writes a reduce-scatter as")


def test_without_jax_one_message_says_what_to_install() -> None:
    ran = explained(WITHOUT_JAX)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        "megatree: --against-jax: the package 'jax' is not installed. "
        "Install it: pip install 'megatree[jax]'.\n"
    )
