"""Every example runs as it stands, stays a page, and checks itself."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
QUICK = {"own_op"}


def marks(path: Path) -> list[pytest.MarkDecorator]:
    return [] if path.stem in QUICK else [pytest.mark.full]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_at_most_sixty_lines_with_prose_on_top(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert text.startswith('"""')
    assert len(text.split('"""')[1].split()) > 30


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=marks(p)) for p in EXAMPLES], ids=lambda path: path.stem
)
def test_an_example_runs(path: Path) -> None:
    root = path.parents[1]
    ran = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
