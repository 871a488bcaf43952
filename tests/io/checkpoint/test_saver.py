"""Saving while training goes on: what is saved is what was, memory is bounded, errors come up."""

import errno
import importlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.io.checkpoint import (
    Piece,
    Retention,
    Saver,
    assign,
    latest,
    load,
    load_extra,
    save,
    snapshot,
    step_name,
    steps_in,
)
from megatree.io.checkpoint.memory import copy_bytes
from megatree.io.checkpoint.ring import Closed, Ring
from megatree.io.world import World
from tests.thread_worlds import threaded_worlds

ONE = World.single()
BLOCK = 1 << 12


def pieces(value: float) -> list[Piece]:
    """Return leaves of about 140 kB: contiguous, transposed, cut out, a scalar."""
    return [
        Piece.whole("a", torch.full((64, 256), value), "ffn embed"),
        Piece.whole("b", torch.full((64, 256), value).t(), "embed ffn"),
        Piece.whole("c", torch.full((40, 30), value)[3:, 5:], "ffn embed"),
        Piece.whole("d", torch.tensor(value), ""),
    ]


def values(path: Any) -> set[float]:
    """Return all values in a checkpoint."""
    targets = [Piece.whole(p.path, torch.zeros_like(p.tensor), p.axes) for p in pieces(0.0)]
    loaded = load(path, targets, world=ONE).pieces
    return {value for p in loaded for value in p.tensor.unique().tolist()}


class Gate:
    """Lets writes to files through only while it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.waiting = threading.Event(), threading.Event()
        pwrite = os.pwrite

        def gated(*args: Any) -> int:
            self.waiting.set()
            assert self.open.wait(30)
            return pwrite(*args)

        monkeypatch.setattr(os, "pwrite", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_a_save_returns_before_the_disk_and_keeps_what_was(tmp_path: Path, gate: Gate) -> None:
    """The law of a snapshot: the update that follows at once does not show."""
    held = pieces(1.0)
    with Saver(ONE, host_bytes=1 << 20, block_bytes=BLOCK) as saver:
        saver.save(tmp_path / step_name(1), held, step=1, extra={"step": 1})
        for piece in held:
            piece.tensor.fill_(7.0)
        assert saver.poll() == []
        assert latest(tmp_path) is None
        gate.open.set()
        saver.wait()
        (done,) = saver.poll()
    assert (done.step, done.path) == (1, str(tmp_path / step_name(1)))
    assert 0 < done.stall_s < done.total_s
    assert values(tmp_path / step_name(1)) == {1.0}
    assert load_extra(tmp_path / step_name(1)) == {"step": 1}


def test_both_ways_of_saving_make_the_same_files(tmp_path: Path) -> None:
    save(tmp_path / "here", pieces(2.0), world=ONE, block_bytes=BLOCK)
    with Saver(ONE, host_bytes=3 * BLOCK, block_bytes=BLOCK) as saver:
        saver.save(tmp_path / "behind", pieces(2.0), step=1)
    for name in ("manifest.msgpack", "rank_00000.bin"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "behind" / name).read_bytes()


def test_what_exceeds_the_memory_is_waited_for(tmp_path: Path, gate: Gate) -> None:
    """Back-pressure within a save: the copy never takes more than was allowed."""
    saver, done = Saver(ONE, host_bytes=4 * BLOCK, block_bytes=BLOCK), threading.Event()

    def main() -> None:
        saver.save(tmp_path / step_name(1), pieces(1.0), step=1)
        done.set()

    thread = threading.Thread(target=main)
    thread.start()
    assert gate.waiting.wait(30)
    assert not done.wait(0.1), "140 kB cannot be in 16 kB"
    gate.open.set()
    thread.join(30)
    saver.wait()
    assert saver.ring is not None
    assert saver.ring.nbytes == 4 * BLOCK
    assert 3 * BLOCK <= saver.ring.most <= 4 * BLOCK
    assert values(tmp_path / step_name(1)) == {1.0}


def test_blocks_of_all_sizes_pass_a_memory_that_holds_one(tmp_path: Path) -> None:
    """A large block waits for what small ones have: none may be kept while the next is awaited."""
    sizes = [7, 300, 1, 1024, 5, 900, 1024, 1024, 3, 700]
    held = [Piece.whole(f"p{k}", torch.full((n,), float(k)), "a") for k, n in enumerate(sizes)]
    saver = Saver(ONE, host_bytes=BLOCK, block_bytes=BLOCK)
    for step in range(10):
        saver.save(tmp_path / step_name(step), held, step=step)
    saver.wait()
    targets = [Piece.whole(p.path, torch.zeros_like(p.tensor), p.axes) for p in held]
    for found, wrote in zip(load(latest(tmp_path), targets, world=ONE).pieces, held, strict=True):  # type: ignore[arg-type]
        assert torch.equal(found.tensor, wrote.tensor)


def test_a_save_waits_for_the_one_before(tmp_path: Path, gate: Gate) -> None:
    """Back-pressure between saves: no more than one copy is held."""
    saver, done = Saver(ONE, host_bytes=1 << 20, block_bytes=BLOCK), threading.Event()
    saver.save(tmp_path / step_name(1), pieces(1.0), step=1)

    def main() -> None:
        saver.save(tmp_path / step_name(2), pieces(2.0), step=2)
        done.set()

    thread = threading.Thread(target=main)
    thread.start()
    assert not done.wait(0.1)
    assert list(steps_in(tmp_path)) == []
    gate.open.set()
    thread.join(30)
    saver.wait()
    assert [saved.step for saved in saver.poll()] == [1, 2]
    assert values(tmp_path / step_name(2)) == {2.0}


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("host_bytes", [1 << 20, 2 * BLOCK])
def test_an_error_in_the_background_comes_up_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_bytes: int
) -> None:
    """With little memory the copy waits for a writer that is gone: it must not wait for ever."""
    saver = Saver(ONE, host_bytes=host_bytes, block_bytes=BLOCK)
    saver.save(tmp_path / step_name(1), pieces(1.0), step=1)
    saver.wait()
    assert [saved.step for saved in saver.poll()] == [1]
    with monkeypatch.context() as patch:
        full_disk(patch)
        saver.save(tmp_path / step_name(2), pieces(2.0), step=2)
        with pytest.raises(OSError, match=r"rank_00000\.bin: cannot write its \d+ bytes \(No sp"):
            poll_for(saver, seconds=30)
    assert [path.name for path in tmp_path.iterdir()] == [step_name(1)]
    saver.save(tmp_path / step_name(3), pieces(3.0), step=3)
    saver.wait()
    assert [saved.step for saved in saver.poll()] == [3]
    assert values(latest(tmp_path)) == {3.0}


def poll_for(saver: Saver, seconds: float) -> None:
    """Look after every "step", as a run does."""
    for _ in range(int(seconds * 100)):
        saver.poll()
        assert saver._thread is not None
        saver._thread.join(0.01)


def test_an_error_comes_up_at_the_next_save_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(ONE, host_bytes=1 << 20, block_bytes=BLOCK)
    with monkeypatch.context() as patch:
        full_disk(patch)
        saver.save(tmp_path / step_name(1), pieces(1.0), step=1)
        assert saver._thread is not None
        saver._thread.join(30)
    with pytest.raises(OSError, match="No space left on device"):
        saver.save(tmp_path / step_name(2), pieces(2.0), step=2)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_one_rank_comes_up_on_all(tmp_path: Path) -> None:
    """Rank 1 finds its file there already; rank 0 is told by the meeting in the background."""

    def go(world: World) -> str:
        saver = Saver(world, host_bytes=1 << 20, block_bytes=BLOCK)
        mine = pieces(1.0)[world.rank :: 2]
        if world.rank == 0:
            (tmp_path / step_name(1)).mkdir()
        world.barrier()
        saver.save(tmp_path / step_name(1), mine, step=1)
        with pytest.raises(ValueError, match="this checkpoint exists already") as caught:
            saver.wait()
        return str(caught.value)

    first, second = in_threads(2, go)
    assert second == f"rank 0: {first}"


def in_threads(size: int, fn: Any) -> list[Any]:
    out: list[Any] = [None] * size

    def main(world: World) -> None:
        out[world.rank] = fn(world)

    threads = [threading.Thread(target=main, args=(world,)) for world in threaded_worlds(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return out


def test_replicas_copy_only_their_share(tmp_path: Path) -> None:
    """Only here: a rank copies a fraction of what it holds, as each byte is written once."""

    def go(world: World) -> int:
        with Saver(world, host_bytes=1 << 20, block_bytes=BLOCK) as saver:
            saver.save(tmp_path / step_name(1), pieces(1.0)[:2], step=1)
            assert saver.ring is not None
            return saver.ring.nbytes

    copied = in_threads(4, go)
    assert copied == [2 * 64 * 256] * 4
    assert sorted(p.stat().st_size for p in (tmp_path / step_name(1)).glob("*.bin")) == copied


def test_boxes_are_shared_again_only_when_some_rank_holds_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To share them takes seconds where ranks are many; an old sharing would lose what is new."""
    shared = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        shared.append(threading.get_ident())
        return assign.assign(*args, **kwargs)

    monkeypatch.setattr(importlib.import_module("megatree.io.checkpoint.save"), "assign", counted)

    def rows(rank: int, cut: int, value: float) -> Piece:
        start, stop = ((0, cut), (cut, 8))[rank]
        return Piece(
            path="w",
            shape=(8, 4),
            dtype=torch.float32,
            axes="ffn embed",
            box=((start, stop), (0, 4)),
            data=torch.full((stop - start, 4), value),
        )

    def go(world: World) -> None:
        with Saver(world, host_bytes=1 << 20, block_bytes=BLOCK) as saver:
            for step, cut in enumerate((4, 4, 4, 6, 6)):
                held = [rows(world.rank, cut, float(step))]
                if step == 2 and world.rank == 1:
                    held.append(Piece.whole("new", torch.full((3,), 2.0), "ffn"))
                saver.save(tmp_path / step_name(step), held, step=step)

    in_threads(2, go)
    assert len(shared) == 2 * 3, "at first, with a new leaf, with other boxes"
    for step in range(5):
        targets = [Piece.whole("w", torch.zeros(8, 4), "ffn embed")]
        targets += [Piece.whole("new", torch.zeros(3), "ffn")] if step == 2 else []
        for piece in load(tmp_path / step_name(step), targets, world=ONE).pieces:
            assert bool((piece.tensor == step).all())


def test_a_run_that_fails_leaves_the_save_under_way_whole(tmp_path: Path, gate: Gate) -> None:
    def fails() -> None:
        with Saver(ONE, host_bytes=1 << 20, block_bytes=BLOCK) as saver:
            saver.save(tmp_path / step_name(1), pieces(1.0), step=1)
            threading.Timer(0.05, gate.open.set).start()
            raise ValueError("the loss is no number")

    with pytest.raises(ValueError, match="the loss is no number"):
        fails()
    assert values(tmp_path / step_name(1)) == {1.0}


def test_memory_that_holds_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"host_bytes 100 hold no block of 4096 bytes\. Give at"):
        Saver(ONE, host_bytes=100, block_bytes=BLOCK)


# -- a copy beside the training -----------------------------------------------------------------


class SlowCopy:
    """Holds copies up until it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.waiting = threading.Event(), threading.Event()

        def gated(*args: Any) -> None:
            self.waiting.set()
            assert self.open.wait(30)
            copy_bytes(*args)

        monkeypatch.setattr(snapshot, "copy_bytes", gated)


@pytest.fixture
def slow_copy(monkeypatch: pytest.MonkeyPatch) -> SlowCopy:
    return SlowCopy(monkeypatch)


def test_what_begins_is_copied_until_it_is_settled(tmp_path: Path, slow_copy: SlowCopy) -> None:
    """A step may read what is copied, and waits before it writes; that wait is the stall."""
    held, settled = pieces(1.0), threading.Event()
    saver = Saver(ONE, host_bytes=1 << 20, block_bytes=BLOCK)
    settle = saver.begin(tmp_path / step_name(1), held, step=1)
    assert slow_copy.waiting.wait(30)

    def main() -> None:
        settle()
        for piece in held:
            piece.tensor.fill_(7.0)
        settled.set()

    thread = threading.Thread(target=main)
    thread.start()
    assert not settled.wait(0.1)
    slow_copy.open.set()
    thread.join(30)
    saver.wait()
    (done,) = saver.poll()
    assert 0.1 <= done.stall_s <= done.total_s
    assert values(tmp_path / step_name(1)) == {1.0}


def test_who_waits_for_a_save_has_settled_it(tmp_path: Path) -> None:
    saver = Saver(ONE, host_bytes=1 << 20, block_bytes=BLOCK)
    settle = saver.begin(tmp_path / step_name(1), pieces(1.0), step=1)
    saver.wait()
    settle()
    saver.begin(tmp_path / step_name(2), pieces(2.0), step=2)
    saver.begin(tmp_path / step_name(3), pieces(3.0), step=3)()
    saver.wait()
    assert [saved.step for saved in saver.poll()] == [1, 2, 3]
    assert values(tmp_path / step_name(2)) == {2.0}


def test_a_copy_that_fails_is_a_failed_save_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError("no memory")

    saver = Saver(ONE, host_bytes=1 << 20, block_bytes=BLOCK)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "copy_bytes", fails)
        saver.save(tmp_path / step_name(1), pieces(1.0), step=1)
        with pytest.raises(ValueError, match="the copy for this checkpoint failed: no memory"):
            saver.wait()
    assert list(tmp_path.iterdir()) == []
    saver.save(tmp_path / step_name(2), pieces(2.0), step=2)
    saver.wait()
    assert values(tmp_path / step_name(2)) == {2.0}


@pytest.mark.gpu
def test_a_device_that_goes_on_is_copied_in_the_order_of_its_work(tmp_path: Path) -> None:
    """What was asked of it before shows, what is asked after does not, freed memory included."""
    with Saver(ONE, host_bytes=64 << 20) as saver:
        for step in range(1, 5):
            held = [torch.zeros(1 << 20, device="cuda") for _ in range(8)]
            torch.cuda._sleep(50_000_000)
            for x in held:
                x.fill_(float(step))
            named = [Piece.whole(f"x{k}", x, "a") for k, x in enumerate(held)]
            settle = saver.begin(tmp_path / step_name(step), named, step=step)
            del named
            settle()
            for x in held:
                x.fill_(7.0)
            held.clear()
            again = [torch.full((1 << 20,), 9.0, device="cuda") for _ in range(8)]
            del again, x
    for step in range(1, 5):
        targets = [Piece.whole(f"x{k}", torch.zeros(1 << 20), "a") for k in range(8)]
        for piece in load(tmp_path / step_name(step), targets, world=ONE).pieces:
            assert bool((piece.tensor == step).all())


# -- the ring --------------------------------------------------------------------------------------


def test_a_ring_hands_out_bytes_that_nobody_else_has() -> None:
    """Drawn sizes, given back in a drawn order, against a record of what is in use."""
    draw = torch.Generator().manual_seed(0)
    ring, used = Ring(1000), []
    assert ring.nbytes == 1024
    start = ring.buffer.data_ptr()

    def give_one_back() -> None:
        index = int(torch.randint(len(used), (), generator=draw))
        ring.give_back(used.pop(index))

    for _ in range(2000):
        size = int(torch.randint(1, 700, (), generator=draw))
        while not ring.fits(size):
            give_one_back()
        got = ring.take(size)
        first = got.data_ptr() - start
        assert first % 64 == 0
        places = [(x.data_ptr() - start, x.data_ptr() - start + x.numel()) for x in used]
        assert all(first + size <= a or b <= first for a, b in places)
        used.append(got)
    assert ring.most <= 1024
    while used:
        give_one_back()
    assert ring.take(1024).numel() == 1024


def test_a_closed_ring_lets_go_of_who_waits() -> None:
    ring = Ring(64)
    ring.take(64)
    threading.Timer(0.05, ring.close).start()
    with pytest.raises(Closed):
        ring.take(1)


# -- retention -------------------------------------------------------------------------------------


def saved_run(directory: Path, retention: Retention, losses: dict[int, float]) -> list[int]:
    """Save steps with a held-out loss; return those that are left."""
    saver = Saver(ONE, retention=retention)
    for step, loss in losses.items():
        metrics = {"metrics": {"valid_loss": loss}} if loss == loss else {}
        saver.save(directory / step_name(step), [], step=step, extra=metrics)
    return list(steps_in(directory))


NAN = float("nan")
LOSSES = {10: 3.0, 15: 1.0, 20: 2.0, 25: NAN, 30: 4.0, 35: 5.0}


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [10, 15, 20, 25, 30, 35]),
        (Retention(last=2), [30, 35]),
        (Retention(last=1, every=10), [10, 20, 30, 35]),
        (Retention(last=1, best=2), [15, 20, 35]),
        (Retention(last=1, best=1, mode="max"), [35]),
        (Retention(last=1, best=1, metric="other"), [35]),
        (Retention(last=2, every=20, best=1), [15, 20, 30, 35]),
    ],
)
def test_retention_keeps_the_last_the_round_and_the_best(
    tmp_path: Path, retention: Retention, left: list[int]
) -> None:
    assert saved_run(tmp_path, retention, LOSSES) == left
    assert sorted(p.name for p in tmp_path.iterdir()) == [step_name(step) for step in left]


def test_retention_touches_nothing_but_complete_checkpoints_up_to_this_one(tmp_path: Path) -> None:
    save(tmp_path / step_name(99), [], world=ONE)
    (tmp_path / step_name(1)).mkdir()
    (tmp_path / "step_2").mkdir()
    (tmp_path / "notes").mkdir()
    assert saved_run(tmp_path, Retention(last=1), {3: 1.0, 4: 1.0}) == [4, 99]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes", "step_00000001", "step_00000004", "step_00000099", "step_2",
    ]  # fmt: skip


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is renamed first, so that `latest` and `steps_in` never see a part of it."""
    import shutil

    saver = Saver(ONE, retention=Retention(last=1))
    saver.save(tmp_path / step_name(1), pieces(1.0), step=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            saver.save(tmp_path / step_name(2), pieces(2.0), step=2)
    assert list(steps_in(tmp_path)) == [2]
    assert values(latest(tmp_path)) == {2.0}
    saver.save(tmp_path / step_name(3), pieces(3.0), step=3)
    assert [p.name for p in tmp_path.iterdir()] == [step_name(3)]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"last": -1}, "Retention: last -1, every 0 and best 0 count checkpoints. Give at least 0"),
        ({"best": 1}, "Retention: last is 0, which keeps all, so every 0 and best 1 change nothin"),
    ],
)
def test_a_retention_that_means_nothing_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Retention(**fields)
