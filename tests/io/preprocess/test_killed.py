"""A killed job leaves no plausible pair, no processes, and nothing in the way of the next run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatree.io.preprocess import preprocess
from tests.io.preprocess.corpora import BYTES, texts, write_lines

ROOT = Path(__file__).parents[3]

# Kills a forked job before its n-th call that changes names on the disk, for every n; after each
# kill the pair must be whole or absent. Prints how many kills there were.
AT_EVERY_STEP = """
    import os, signal, sys, warnings
    from pathlib import Path
    from megatree.io.data.indexed import IndexedFile
    from megatree.io.preprocess import Recipe, preprocess
    from megatree.io.tokenizers import TokenizerSpec, read_beside

    folder, *names = map(Path, sys.argv[1:])
    recipe = Recipe(tokenizer=TokenizerSpec(kind="bytes"), append_eod=True)
    prefix = f"{folder / 'out'}_text_document"

    def job(kill_at):
        left = [kill_at]
        def counted(call):
            def wrapped(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapped
        os.replace, os.unlink = counted(os.replace), counted(os.unlink)
        Path.unlink = counted(Path.unlink)
        preprocess(names, str(folder / "out"), recipe, overwrite=True)
        os._exit(0)

    for kill_at in range(100):
        for one in folder.glob("out*_document*"):
            one.unlink()
        pid = os.fork()
        if not pid:
            job(kill_at)
        _, status = os.waitpid(pid, 0)
        if Path(f"{prefix}.idx").exists():
            assert IndexedFile(prefix).num_documents == 3
            assert read_beside(prefix)["counts"]["documents"] == 3
        if status == 0:
            print(kill_at)
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    left = sorted(one.name for one in folder.iterdir())
    assert left == ["out_text_document.bin", "out_text_document.idx",
                    "out_text_document.meta.json"], left
"""

# Encodes with two processes; says so after the first block, then hangs.
UNTIL_KILLED = """
    import sys, time
    from pathlib import Path
    from megatree.io.preprocess import Recipe, preprocess
    from megatree.io.tokenizers import TokenizerSpec

    def report(progress):
        print("encoding", flush=True)
        time.sleep(600)

    if __name__ == "__main__":
        recipe = Recipe(tokenizer=TokenizerSpec(kind="bytes"), append_eod=True)
        preprocess([Path(sys.argv[1])], sys.argv[2], recipe, workers=2, report=report)
"""


def script(path: Path, text: str) -> list[str]:
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return [sys.executable, str(path)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_kill_before_any_change_of_names_leaves_a_whole_pair_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    inputs = [write_lines(tmp_path / f"{n}.jsonl", [{"text": f"text {n}"}]) for n in range(3)]
    ran = subprocess.run(
        [*script(tmp_path / "kill.py", AT_EVERY_STEP), str(folder), *map(str, inputs)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 10, "kills: nine files are renamed for the parts alone"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_killed_job_leaves_no_pair_and_no_processes(tmp_path: Path) -> None:
    """Workers waited for ever on pipes that they held open themselves."""
    path = write_lines(tmp_path / "a.jsonl", ({"text": f"{n} " * 50_000} for n in range(60)))
    folder = tmp_path / "out"
    folder.mkdir()
    with subprocess.Popen(
        [*script(tmp_path / "job.py", UNTIL_KILLED), str(path), str(folder / "a")],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "encoding\n"
        assert len(processes_of(job.pid)) >= 4, "the job, two workers and what started them"
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        deadline = time.monotonic() + 20
        while left := processes_of(job.pid):
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.05)
    found = [one.name for one in folder.iterdir()]
    assert found, "what was begun"
    assert all(name.startswith(".a_text_document.") for name in found), found
    summary = preprocess([path], str(folder / "a"), BYTES)
    assert len(texts(summary.prefixes["text"])) == 60
    assert len(list(folder.iterdir())) == 3, "what the killed job left is swept"


def processes_of(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found
