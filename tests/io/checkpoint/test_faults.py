"""Targets that fail, in the foreground and behind it: the last checkpoint stays, the error names
the file.
"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatree.io.checkpoint import Piece, Saver, latest, load, step_name
from megatree.io.world import World

ONE = World.single()
BLOCK = 1 << 14


def piece(value: float) -> Piece:
    """Return 256 kB."""
    return Piece.whole("w", torch.full((256, 256), value), "ffn embed")


@pytest.fixture(params=[0, 1 << 20, 2 * BLOCK], ids=["waited for", "behind", "tight"])
def saver(request: pytest.FixtureRequest) -> Saver:
    return Saver(ONE, host_bytes=request.param, block_bytes=BLOCK)


def save(saver: Saver, path: Path, value: float) -> None:
    saver.save(path, [piece(value)], step=int(value))
    saver.wait()


def assert_last_is(directory: Path, value: float) -> None:
    path = latest(directory)
    assert path is not None
    assert path.name == step_name(int(value))
    target = piece(0.0)
    load(path, [target], world=ONE)
    assert bool((target.tensor == value).all())


@contextmanager
def files_up_to(nbytes: int) -> Iterator[None]:
    """Let the kernel refuse to make files longer, as a full disk does in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_in_the_middle(saver: Saver, tmp_path: Path) -> None:
    """No stand-in: the kernel itself cuts the file."""
    save(saver, tmp_path / step_name(1), 1.0)
    text = r"/rank_00000\.bin: cannot write its 262144 bytes \(File too large\)\. Make room, or"
    with files_up_to(100_000), pytest.raises(OSError, match=text):
        save(saver, tmp_path / step_name(2), 2.0)
    assert [path.name for path in tmp_path.iterdir()] == [step_name(1)]
    assert_last_is(tmp_path, 1.0)
    save(saver, tmp_path / step_name(2), 2.0)
    assert_last_is(tmp_path, 2.0)


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "rename"])
def test_a_target_that_turns_read_only(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """At each kind of call that a save makes: whatever fails, nothing half is left behind."""
    save(saver, tmp_path / step_name(1), 1.0)
    plain = getattr(os, call)

    def refused(path: object, *args: object, **kwargs: object) -> object:
        reads = call == "open" and not args[0] & os.O_CREAT  # type: ignore[operator]
        if reads or (call == "fsync" and not name_of(path).endswith(".bin")):
            return plain(path, *args, **kwargs)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refused)
        with pytest.raises(OSError, match="Read-only file system"):
            save(saver, tmp_path / step_name(2), 2.0)
    assert [path.name for path in tmp_path.iterdir()] == [step_name(1)]
    assert_last_is(tmp_path, 1.0)
    save(saver, tmp_path / step_name(3), 3.0)
    assert_last_is(tmp_path, 3.0)


def name_of(descriptor: object) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def test_a_target_that_nobody_may_write_is_named(saver: Saver) -> None:
    """A directory of the kernel: not even root makes one there."""
    with pytest.raises(
        OSError,
        match=r"^/proc/megatree/step_00000001: the checkpoint cannot be made \(No such file or "
        r"directory\)\. Save to a directory that every rank sees and may write; earlier",
    ):
        save(saver, Path("/proc/megatree") / step_name(1), 1.0)


def test_a_file_in_place_of_the_directory_is_named(saver: Saver, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match=r"run/step_00000001: the checkpoint cannot be made \("):
        save(saver, tmp_path / "run" / step_name(1), 1.0)


def test_of_two_savers_of_one_step_the_first_stays(saver: Saver, tmp_path: Path) -> None:
    other = Saver(ONE, host_bytes=1 << 20, block_bytes=BLOCK)
    other.save(tmp_path / step_name(1), [piece(7.0)], step=1)
    other.wait()
    with pytest.raises(ValueError, match="this checkpoint exists already, and a save never repl"):
        save(saver, tmp_path / step_name(1), 1.0)
    path = latest(tmp_path)
    target = piece(0.0)
    load(path, [target], world=ONE)  # type: ignore[arg-type]
    assert bool((target.tensor == 7.0).all())
