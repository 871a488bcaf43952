"""How much memory a save and a load take beside the arrays: bounded by settings, measured."""

from collections.abc import Callable
from pathlib import Path

import torch

from megatree.io.checkpoint import Piece, Saver, load, save
from megatree.io.checkpoint.write import NUM_THREADS
from megatree.io.world import World

ONE = World.single()
MIB = 1 << 20
BLOCK = MIB // 2
SHAPE = (4096, 2048)  # 32 MiB
SLACK = 3 * MIB  # of the allocator, of threads, and of what Python imports on the way


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith(f"{field}:"))


def grown_by(act: Callable[[], object]) -> int:
    """Return by how many bytes the process grew at most."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    act()
    return resident("VmHWM") - before


def transposed() -> Piece:
    """Return what must be copied before it can be written."""
    return Piece.whole("w", torch.ones(SHAPE[::-1]).t(), "ffn embed")


def test_what_must_be_copied_is_a_few_blocks_at_a_time(tmp_path: Path) -> None:
    """Only here: a copy of a whole array, which no test of values sees."""
    piece = transposed()
    save(tmp_path / "warm", [Piece.whole("w", torch.ones(8, 8), "a b")], world=ONE)
    saved = grown_by(lambda: save(tmp_path / "c", [piece], world=ONE, block_bytes=BLOCK))
    assert saved < NUM_THREADS * BLOCK + SLACK, f"{saved / MIB:.1f} MiB"
    target = Piece.whole("w", torch.zeros(SHAPE[::-1]).t(), "ffn embed")
    loaded = grown_by(lambda: load(tmp_path / "c", [target], world=ONE))
    assert loaded < NUM_THREADS * BLOCK + SLACK, f"{loaded / MIB:.1f} MiB"
    assert bool((target.tensor == 1).all())


def test_a_save_behind_takes_the_memory_it_may_have_and_keeps_it(tmp_path: Path) -> None:
    piece = transposed()
    for name, host_bytes in (("some", 16 * MIB), ("all", 64 * MIB)):
        saver = Saver(ONE, host_bytes=host_bytes, block_bytes=BLOCK)

        def go(saver: Saver = saver, name: str = name) -> None:
            saver.save(tmp_path / name, [piece], step=1)
            saver.wait()

        copied = min(host_bytes, 32 * MIB)
        assert copied - SLACK < grown_by(go) < copied + SLACK, name
        again = grown_by(lambda n=name: go(name=f"{n} again"))  # type: ignore[misc]
        assert again < SLACK, "the memory is used again"
