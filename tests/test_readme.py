"""The README's program runs as it stands and shows what the text claims."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_program_of_a_page_runs_and_every_layout_gives_one_loss(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    file = tmp_path / "page.py"
    file.write_text(program)
    ran = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=README.parent,
        env={"PYTHONPATH": str(README.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    rows = re.findall(r"^(.{32}) loss (\S+)  \|grad table\| (\S+)", ran.stdout, re.MULTILINE)
    assert len(rows) == 4
    losses, norms = {row[1] for row in rows}, {row[2] for row in rows}
    assert max(map(float, losses)) - min(map(float, losses)) < 1e-5
    assert max(map(float, norms)) - min(map(float, norms)) < 1e-5
    (last,) = re.findall(r"loss after 30 steps: (\S+)", ran.stdout)
    assert float(last) < 2.0
