"""A hang names who waits in which call and where the others are; real ranks, a wait that ends."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatree.io.world import World
from megatree.parallel.comm import Axes
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.schedule import one_f_one_b
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.processes import GroupBoard, RankFailed, launch, world_of_group
from megatree.runtime.recorded import Call, RecordedComm, Recorder, recorded_world
from megatree.runtime.watchdog import HUNG, Standing, Watchdog, partners, report
from tests.ranks import ranks
from tests.runtime.tiny_step import BATCH, tiny_data, tiny_step

LATE_S = 0.4
DP = Mesh(dp=2)


class Watched:
    """A rank under a watchdog that tells `woke` instead of ending the process."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.world, self.recorder = mesh, world_of_group(), Recorder()
        self.comm = RecordedComm(ProcessComm(mesh), self.recorder)
        self.woke = threading.Event()
        self.told: list[tuple[str, bool]] = []

    def end(self, text: str, tells: bool) -> None:
        self.told.append((text, tells))
        self.woke.set()

    def watch(self) -> Watchdog:
        """Return the watchdog, to be entered."""
        return Watchdog(
            self.recorder,
            GroupBoard(),
            rank=self.world.rank,
            coords=[self.mesh.coords(rank) for rank in range(self.mesh.num_ranks)],
            timeout_s=LATE_S,
            end=self.end,
        )

    def report(self) -> str:
        """Return the report, which all ranks have and one tells."""
        everywhere = self.world.gather(self.told)
        assert len({text for ((text, _),) in everywhere}) == 1
        assert sum(tells for ((_, tells),) in everywhere) == 1
        return self.told[0][0]


@ranks(2)
def test_a_rank_that_is_late_is_named_with_its_python() -> None:
    rank = Watched(DP)
    rank.comm.prepare([("dp",)])
    with rank.watch():
        rank.comm.psum(torch.ones(3), ("dp",))
        if rank.world.rank == 1:
            rank.woke.wait(20)
        rank.comm.at("model.py:12").psum(torch.ones(2, 4), ("dp",))
        rank.woke.wait(20)
    text = rank.report()
    line = r"psum\(dp\) of float32 \[2, 4\], call 2, forward, at model\.py:12"
    assert re.match(rf"hang: rank 0 has waited 0\.\d+ s in {line}\. Every rank has to", text)
    assert re.search(rf"\n  rank 0: waits in {line}\n", text)
    assert re.search(
        r"\n  rank 1: waits for nobody, is at \S+/threading\.py:\d+ wait < \S+ wait < "
        r"runtime/test_watchdog\.py:\d+ test_a_rank_that_is_late",
        text,
    )
    assert "rank 1 has made 1 calls over dp, rank 0 waits in its call 2" in text


@ranks(2)
def test_a_call_that_one_rank_left_out_is_named() -> None:
    """Both ranks wait, each in another call: the first that differs is the one to look at."""
    rank = Watched(DP)
    rank.comm.prepare([("dp",)])
    recorder, first = rank.recorder, rank.world.rank == 0
    with rank.watch():
        rank.comm.at("model.py:1").psum(torch.ones(4), ("dp",))
        if first:  # noted as a call, and made by nobody else
            call = recorder.begin("psum", "dp", torch.ones(4), "model.py:2", "forward")
            recorder.wait(call, rank.woke.wait, 20)
        else:
            call = recorder.begin("all_gather", "dp", torch.ones(4), "model.py:3", "forward")
            recorder.wait(call, rank.woke.wait, 20)
    assert (
        "call 2 over dp was psum of float32 [4], forward, at model.py:2 on rank 0, and "
        "all_gather of float32 [4], forward, at model.py:3 on rank 1"
    ) in rank.report()


def steps_under(layout: Layout, sleeps: int, before: Callable[[Watched], Any]) -> str:
    """Run a step while one rank does something first; return the report."""
    rank = Watched(layout.mesh)
    step = tiny_step(layout, rank.comm)
    state, batch = step.init(), tiny_data().batch(0, BATCH)
    with rank.watch():
        if rank.world.rank == sleeps:
            before(rank)
        step(state, [step.local(batch)])
        rank.woke.wait(20)
    return rank.report()


@pytest.mark.full
@ranks(2)
def test_the_line_of_the_model_is_named() -> None:
    layout = Layout(Mesh(tp=2), Rules(kv_heads="tp", ffn="tp", vocab="tp"))
    text = steps_under(layout, 1, lambda rank: rank.woke.wait(20))
    assert re.search(
        r"rank 0: waits in psum\(tp\) of float32 \[4, 8, 16\], call \d+, forward, at \S+\.py:\d+",
        text,
    )
    assert "at models/" in text


@ranks(2)
def test_a_wait_in_a_backward_is_named_as_such() -> None:
    layout = Layout(Mesh(tp=2), Rules(kv_heads="tp", ffn="tp", vocab="tp"))

    def block(rank: Watched) -> None:
        inner = rank.comm.comm
        plain = inner.psum

        def psum(x: Tensor, axes: Axes) -> Tensor:
            if torch._C._current_graph_task_id() != -1 and not rank.woke.is_set():
                rank.recorder._now = None  # it is elsewhere, before its call
                rank.woke.wait(20)
            return plain(x, axes)

        inner.psum = psum  # type: ignore[method-assign]

    text = steps_under(layout, 1, block)
    assert re.search(r"rank 0: waits in psum\(tp\) of .*, backward, at models/\S+\.py:\d+", text)


@ranks(2)
def test_a_wait_for_a_stage_is_named() -> None:
    layout = Layout(Mesh(pp=2), schedule=one_f_one_b)
    text = steps_under(layout, 0, lambda rank: rank.woke.wait(20))
    assert re.search(
        r"rank 1: waits in recv\(pp 0>1\) of float32 \[4, 8, 16\], call 1, at input of stage 1, "
        r"microbatch 0",
        text,
    )
    assert "rank 0 has made 0 calls over pp 0>1, rank 1 waits in its call 1" in text


@ranks(2)
def test_a_wait_for_a_meeting_is_named() -> None:
    rank = Watched(DP)
    world = recorded_world(rank.world, rank.recorder)
    with rank.watch():
        if world.rank == 1:
            rank.woke.wait(20)
        world.on_first(lambda: None)
        rank.woke.wait(20)
    assert re.search(
        r"rank 0: waits in gather\(all ranks\), call 1, at runtime/test_watchdog.py:\d+",
        rank.report(),
    )


@ranks(2)
def test_no_wait_no_report() -> None:
    rank = Watched(DP)
    rank.comm.prepare([("dp",)])
    with rank.watch():
        for _ in range(4):
            rank.comm.psum(torch.ones(4), ("dp",))
            time.sleep(LATE_S / 3)  # longer than the time-out in all, in no call
    assert not rank.told
    assert rank.recorder.waiting() is None


def _late(device: torch.device) -> str:
    world, recorder = world_of_group(), Recorder()
    comm = RecordedComm(ProcessComm(DP), recorder)
    comm.prepare([("dp",)])
    coords = [DP.coords(rank) for rank in range(2)]
    with Watchdog(recorder, GroupBoard(), rank=world.rank, coords=coords, timeout_s=LATE_S):
        if world.rank == 1:
            time.sleep(60.0)
        comm.at("model.py:12").psum(torch.ones(4), ("dp",))
    return "never"


@pytest.mark.full
def test_a_hang_ends_the_job_with_the_report() -> None:
    begun = time.monotonic()
    with pytest.raises(RankFailed, match=r"hang: rank 0 has waited .* at model\.py:12") as caught:
        launch(_late, 2, threads=1)
    assert caught.value.refusal is not None
    assert re.search(r"rank 1: waits for nobody, is at .*test_watchdog", caught.value.refusal)
    assert time.monotonic() - begun < 50.0
    assert HUNG == 75


def test_a_rank_without_an_answer_is_named() -> None:
    standing = Standing(over="dp", call="psum(dp), call 3, at a.py:1", number=3, seconds=9.0)
    text = report({0: standing, 1: standing}, [{"dp": rank} for rank in range(5)], 8.0)
    assert text.startswith("hang: rank 0 has waited 9 s in psum(dp), call 3, at a.py:1. Every rank")
    assert "\n  ranks 0-1: waits in psum(dp), call 3, at a.py:1" in text
    assert "\n  ranks 2-4: gave no answer: gone, or stuck outside Python" in text


def test_a_step_that_makes_no_call_is_waited_in() -> None:
    """Calls within what torch compiled are not noted: the step around them is."""
    recorder, seen = Recorder(), []

    def step(number: int) -> int:
        seen.append(str(recorder.waiting()))
        recorder.wait(recorder.begin("psum", "dp", None, "a.py:1", ""), time.sleep, 0.05)
        waiting = recorder.waiting()
        assert waiting is not None
        seen.append(str(waiting[0]))
        assert waiting[1] < 0.04, "a call that ended starts the wait anew"
        return number

    assert recorder.alone("step", step, 7) == 7
    assert recorder.waiting() is None
    assert seen[1].startswith("step(alone), call 1, at runtime/test_watchdog.py:")
    assert partners("alone", 0, [{"dp": 0}, {"dp": 1}]) == [0]


def test_a_rank_alone_in_its_step_is_named_by_its_python() -> None:
    waits = Standing(over="dp", call="psum(dp), call 3, at a.py:1", number=3, seconds=9.0)
    alone = Standing(over="alone", call="step(alone), call 7, at t.py:2", seconds=20.0)
    alone = replace(alone, stack=["b.py:4 read", "c.py:5 load"])
    text = report({0: alone, 1: waits}, [{"dp": 0}, {"dp": 1}], 8.0)
    assert text.startswith("hang: rank 1 has waited 9 s in psum(dp)"), "not the one at work"
    assert "\n  rank 0: waits for nobody, is at b.py:4 read < c.py:5 load" in text
    text = report({0: alone, 1: alone}, [{"dp": 0}, {"dp": 1}], 8.0)
    assert text.startswith("hang: rank 0 has waited 20 s in step(alone), call 7, at t.py:2.")


def test_who_makes_a_call_together() -> None:
    mesh = Mesh(pp=2, dp=2, tp=2)
    coords = [mesh.coords(rank) for rank in range(8)]
    assert partners("dp", 1, coords) == [1, 3]
    assert partners("dp.tp", 5, coords) == [4, 5, 6, 7]
    assert partners("pp 0>1", 2, coords) == [2, 6]
    assert partners("all ranks", 2, coords) == list(range(8))


def test_a_call_in_print() -> None:
    operand = torch.float32, (4,)
    call = Call("psum", "dp.tp", 3, operand, "gpt.py:8", "backward")
    assert str(call) == "psum(dp.tp) of float32 [4], call 3, backward, at gpt.py:8"
    both = [Call(kind, "pp 0>1", 3, operand, "x", "") for kind in ("send", "recv")]
    assert both[0].label == both[1].label, "the two ends of a message"


def test_a_recorder_keeps_what_it_was_told() -> None:
    recorder = Recorder()
    world = recorded_world(World.single(), recorder)
    assert world.gather(3) == [3]
    assert world.broadcast("a") == "a"
    world.barrier()
    assert recorder.counts == {"all ranks": 3}
    assert [call.kind for call in recorder.recent["all ranks"]] == [
        "gather",
        "broadcast",
        "barrier",
    ]
