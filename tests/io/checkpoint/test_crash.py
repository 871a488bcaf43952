"""A save that dies at any moment leaves the checkpoints before it, and `latest` knows."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatree.io.checkpoint import Piece, latest, load_extra, save, step_name
from megatree.io.checkpoint.directory import staged
from megatree.io.checkpoint.place import Folder, place_of
from megatree.io.world import World
from tests.io.checkpoint.forked import Server, assert_latest_is_whole, serving

ONE = World.single()
NUM_KILLS = 20


def start(server: Server, directory: Path, first: int, die_at: int = 0) -> int:
    """Fork a saver and return its process id."""
    return int(server.ask(f"{directory} {first} {die_at}", first, "pid"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("crash_server.py") as started:
        yield started


def assert_latest(directory: Path, at_least: int) -> int:
    targets = [
        Piece.whole("w", torch.zeros(512, 256), "ffn embed"),
        Piece.whole("m.w", torch.zeros(256, 512), "embed ffn"),
        Piece.whole("step", torch.tensor(0), ""),
    ]
    return assert_latest_is_whole(directory, at_least, targets)


def staging_left(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.endswith(".megatree-tmp")]


def test_killed_at_random_moments_the_last_checkpoint_loads(server, tmp_path):
    """SIGKILL from outside, at moments drawn over the length of a save, however long it takes."""
    draw, directory, step, interrupted, seconds = random.Random(0), tmp_path / "run", 0, 0, 0.02
    for _ in range(NUM_KILLS):
        child = start(server, directory, step + 1)
        for _ in range(draw.randint(0, 2)):
            begun = time.monotonic()
            assert server.wait_for("saved")
            seconds = time.monotonic() - begun
        assert server.wait_for("ended", draw.uniform(0.0, seconds)) is None
        os.kill(child, signal.SIGKILL)
        assert server.wait_for("ended") == str(int(signal.SIGKILL))
        step = assert_latest(directory, at_least=server.saved)
        interrupted += bool(directory.exists() and staging_left(directory))
    assert interrupted >= NUM_KILLS // 4, "few kills met a save: the test sees nothing"
    assert step >= NUM_KILLS // 2
    save(directory / step_name(step + 1), [], world=ONE, extra={"step": step + 1})
    assert staging_left(directory) == []


def test_killed_before_each_call_to_the_disk_the_last_checkpoint_loads(server, tmp_path):
    """Every point between two system calls of a save, one by one, that follows a good save."""
    outcomes = []
    for die_at in range(1, 200):
        directory = tmp_path / str(die_at)
        start(server, directory, 1, die_at)
        assert server.wait_for("ended") == str(int(signal.SIGKILL))
        step = assert_latest(directory, at_least=server.saved)
        outcomes.append((server.saved, step))
        if server.saved == 2:
            break
    saved, found = zip(*outcomes, strict=True)
    assert set(saved) == {0, 1, 2}
    assert all(step - done in (0, 1) for done, step in outcomes)
    # the rename is the moment: before it the old step, after it the new, acknowledged or not
    assert list(found) == sorted(found)
    assert (0, 1) in outcomes
    assert (1, 2) in outcomes


def test_everything_is_on_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    """Only here: the order that a loss of power needs, which no kill of a process can show."""
    calls = []

    def recorded(name, describe):
        original = getattr(os, name)

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append((name, describe(*args)))
            return result

        monkeypatch.setattr(os, name, call)

    def file_of(descriptor, *_):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    recorded("pwrite", file_of)
    recorded("fsync", file_of)
    recorded("rename", lambda _, final: final.name)
    save(tmp_path / "new" / "c", [Piece.whole("w", torch.zeros(4), "embed")], world=ONE)
    names = [(name, what if "megatree-tmp" not in what else "STAGING") for name, what in calls]
    assert names == [
        ("fsync", tmp_path.name),
        ("pwrite", "rank_00000.bin"),
        ("fsync", "rank_00000.bin"),
        ("fsync", "manifest.msgpack"),
        ("fsync", "STAGING"),
        ("rename", "c"),
        ("fsync", "new"),
    ]


def test_latest_is_the_largest_complete_step(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    for step in (9, 100_000_000, 10):
        save(tmp_path / step_name(step), [], world=ONE)
    (tmp_path / "step_999999999").mkdir()
    (tmp_path / ".step_00000011.0123456789abcdef.megatree-tmp").mkdir()
    (tmp_path / "step_00000012.bak").mkdir()
    (tmp_path / "step_200000000").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step_100000000"


def test_a_save_removes_what_dead_ones_left_and_nothing_else(tmp_path):
    stale = tmp_path / ".step_00000001.0123456789abcdef.megatree-tmp"
    stale.mkdir()
    (stale / "rank_00000.bin").write_bytes(b"x")
    kept = [".step_1.xyz.megatree-tmp", "step_00000003", "notes.megatree-tmp"]
    for name in kept:
        (tmp_path / name).mkdir()
    target = tmp_path / "elsewhere"
    target.mkdir()
    link = tmp_path / ".link.0123456789abcdef.megatree-tmp"
    link.symlink_to(target)
    save(tmp_path / "step_00000004", [], world=ONE)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {*kept, "elsewhere", link.name, "step_00000004"}


def test_two_writers_in_one_directory_do_not_disturb_each_other(tmp_path):
    """Only here: a living save must not look stale to another job's."""
    with staged(place_of(tmp_path / "step_00000001"), ONE) as staging:
        assert isinstance(staging, Folder)
        (staging / "manifest.msgpack").write_bytes(b"")
        save(tmp_path / "step_00000002", [], world=ONE)
        assert staging.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]


def test_of_two_writers_of_one_step_the_second_fails_and_the_first_stays(tmp_path):
    def both() -> None:
        with staged(place_of(tmp_path / "c"), ONE):
            save(tmp_path / "c", [], world=ONE, extra={"first": True})

    with pytest.raises(ValueError, match="this checkpoint exists already"):
        both()
    assert load_extra(tmp_path / "c") == {"first": True}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_interrupt_removes_the_staging_directory(tmp_path):
    def interrupted() -> None:
        with staged(place_of(tmp_path / "c"), ONE):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
