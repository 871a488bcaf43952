"""One global message order never deadlocks and never mixes messages up; local orders do."""

from collections.abc import Callable
from random import Random

import pytest

from megatree.parallel.schedule import (
    Action,
    Costs,
    Event,
    Recv,
    Schedule,
    Send,
    feeds,
    gpipe,
    interleaved,
    needs,
    one_f_one_b,
    rank_programs,
    run_blocking,
    run_fifo,
    zero_bubble_h1,
    zero_bubble_v,
)
from tests.parallel.schedule.random_schedule import random_schedule, random_schedules

Programs = list[list[Event]]


def received(action: Action, schedule: Schedule) -> int | None:
    """The rank from which an action gets its message, if it gets one."""
    neighbour = [n for n in needs(action, schedule.num_stages) if n.stage != action.stage]
    if not neighbour:
        return None
    source = schedule.stage_rank[neighbour[0].stage]
    return None if source == schedule.stage_rank[action.stage] else source


def sent(action: Action, schedule: Schedule) -> Send | None:
    """The message that an action makes, if it makes one."""
    message = feeds(action, schedule.num_stages)
    if message is None or schedule.stage_rank[message.stage] == schedule.stage_rank[action.stage]:
        return None
    return Send(schedule.stage_rank[message.stage], message)


def receiver_order(schedule: Schedule) -> Programs:
    """Every rank receives right before it reads and sends right after it has made."""
    programs: Programs = []
    for row in schedule.ranks:
        program: list[Event] = []
        for action in row:
            source = received(action, schedule)
            program += [] if source is None else [Recv(source, action)]
            send = sent(action, schedule)
            program += [action] if send is None else [action, send]
        programs.append(program)
    return programs


def sender_order(schedule: Schedule) -> Programs:
    """Every rank receives, when it must read, all that was sent before on that channel."""
    channels: dict[tuple[int, int], list[Action]] = {}
    for rank, row in enumerate(schedule.ranks):
        for send in (sent(action, schedule) for action in row):
            if send is not None:
                channels.setdefault((rank, send.to_rank), []).append(send.message)
    programs: Programs = []
    for rank, row in enumerate(schedule.ranks):
        program: list[Event] = []
        have: set[Action] = set()
        for action in row:
            source = received(action, schedule)
            while source is not None and action not in have:
                message = channels[source, rank].pop(0)
                have.add(message)
                program.append(Recv(source, message))
            send = sent(action, schedule)
            program += [action] if send is None else [action, send]
        programs.append(program)
    return programs


def direction_order(schedule: Schedule) -> Programs:
    """A forward and the backward after it are one step: messages with the previous stage first."""
    programs: Programs = []
    for row in schedule.ranks:
        program: list[Event] = []
        rest = list(row)
        while rest:
            pair = [action.kind for action in rest[:2]] == ["F", "B"]
            step, rest = rest[: 1 + pair], rest[1 + pair :]
            sources = [(received(action, schedule), action) for action in step]
            sends = [sent(action, schedule) for action in reversed(step)]
            program += [Recv(source, a) for source, a in sources if source is not None]
            program += [*step, *(send for send in sends if send is not None)]
        programs.append(program)
    return programs


def failures(
    schedules: list[Schedule],
    order: Callable[[Schedule], Programs],
    run: Callable[[Programs], None],
) -> int:
    """Of how many schedules the programs fail on a kind of channel."""
    count = 0
    for schedule in schedules:
        try:
            run(order(schedule))
        except ValueError:
            count += 1
    return count


def in_global_order(schedule: Schedule) -> Programs:
    return [list(program) for program in rank_programs(schedule)]


def test_300_random_schedules_run_in_the_global_order() -> None:
    schedules = random_schedules(300, seed=7)
    assert failures(schedules, in_global_order, run_blocking) == 0
    assert failures(schedules, in_global_order, run_fifo) == 0


def test_receiver_order_mixes_up_messages_of_random_interleaved_schedules() -> None:
    rng = Random(0)
    schedules = [random_schedule(rng, (0, 1, 0, 1), 4) for _ in range(200)]
    assert failures(schedules, receiver_order, run_fifo) > 190
    assert failures(schedules, in_global_order, run_fifo) == 0
    assert failures(schedules, sender_order, run_fifo) == 0


def test_sender_order_deadlocks_when_sends_block() -> None:
    rng = Random(0)
    schedules = [random_schedule(rng, (0, 1, 0, 1), 4) for _ in range(200)]
    assert failures(schedules, sender_order, run_blocking) > 150
    assert failures(schedules, in_global_order, run_blocking) == 0
    with pytest.raises(ValueError, match=r"deadlock: rank 0 at .*, rank 1 at ") as error:
        run_blocking(sender_order(one_f_one_b(2, 4)))
    assert "->" in str(error.value)


def test_two_ranks_with_virtual_stages_are_megatrons_trap() -> None:
    """The next and the previous stage are the same peer there, so "previous first" on both sides
    pairs a gradient with an activation: wrong gradients in silence, as messages bear no names."""
    for p, v in [(2, 1), (3, 2), (4, 2), (4, 3)]:
        run_fifo(direction_order(interleaved(p, 2 * p, v)))
    for m in (2, 4, 6):
        with pytest.raises(ValueError, match=r"message F\d\.\d with rank 0, which is at B\d\.\d"):
            run_fifo(direction_order(interleaved(2, m, 2)))
        run_fifo(in_global_order(interleaved(2, m, 2)))
        run_blocking(in_global_order(interleaved(2, m, 2)))


@pytest.mark.parametrize(
    "schedule",
    [
        gpipe(3, 4),
        one_f_one_b(4, 6),
        interleaved(3, 6, 2),
        zero_bubble_h1(3, 5),
        zero_bubble_v(3, 5),
    ],
    ids=["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"],
)
def test_programs_hold_each_action_and_each_message_once_in_a_possible_order(
    schedule: Schedule,
) -> None:
    programs = rank_programs(schedule)
    sends, receives = [], []
    for rank, program in enumerate(programs):
        assert [e for e in program if isinstance(e, Action)] == list(schedule.ranks[rank])
        have: set[Action] = set()
        for event in program:
            if isinstance(event, Send):
                kind, stage, i = event.message
                maker = Action(kind, stage - 1 if kind == "F" else stage + 1, i)
                assert maker in have, f"{event} before {maker}"
                sends.append((rank, event.to_rank, event.message))
            elif isinstance(event, Recv):
                assert event.message not in have, f"{event} after its reader"
                receives.append((event.from_rank, rank, event.message))
            else:
                source = received(event, schedule)
                assert source is None or (source, rank, event) in receives
                have.add(event)
    crossing = [
        action for row in schedule.ranks for action in row if received(action, schedule) is not None
    ]
    assert sorted(sends) == sorted(receives)
    assert sorted(message for _, _, message in sends) == sorted(crossing)


def test_all_ranks_see_their_messages_in_one_order() -> None:
    """The orders of the ranks' messages, joined, have no cycle."""
    for schedule in random_schedules(50, seed=9):
        names = [
            [e.message for e in program if isinstance(e, Send | Recv)]
            for program in rank_programs(schedule)
        ]
        left = {message for program in names for message in program}
        while left:
            heads = [next((m for m in program if m in left), None) for program in names]
            first = {m for m in heads if m and heads.count(m) == sum(m in p for p in names)}
            assert first, "no message is the next of all the ranks that take part in it"
            left -= first


def test_the_neighbours_of_a_v_at_its_turn_exchange_no_message() -> None:
    last = rank_programs(zero_bubble_v(4, 4))[3]
    messages = [e.message for e in last if isinstance(e, Send | Recv)]
    assert not [m for m in messages if (m.kind, m.stage) in {("F", 4), ("B", 3)}]
    assert rank_programs(gpipe(1, 2)) == (tuple(gpipe(1, 2).ranks[0]),)


def test_the_order_holds_for_any_durations_zero_included() -> None:
    rng = Random(11)
    for schedule in random_schedules(100, seed=13):
        forward, inputs, weights = (
            [rng.choice([0.0, 0.0, 1.0, 2.5]) for _ in schedule.stage_rank] for _ in "FBW"
        )
        costs = Costs(
            forward=forward,
            input_grad=inputs,
            weight_grad=weights,
            transfer=rng.choice([0.0, 0.7]),
        )
        programs = rank_programs(schedule, costs)
        run_blocking(programs)
        run_fifo(programs)
        for program, row in zip(programs, schedule.ranks, strict=True):
            assert [e for e in program if isinstance(e, Action)] == list(row)


def test_a_lost_message_and_two_swapped_receives_are_seen() -> None:
    programs = in_global_order(gpipe(2, 2))
    at = [n for n, e in enumerate(programs[1]) if isinstance(e, Recv)]
    first, second = programs[1][at[0]], programs[1][at[1]]
    programs[1][at[0]], programs[1][at[1]] = second, first
    for run in (run_blocking, run_fifo):
        with pytest.raises(ValueError, match=r"message F1\.\d with rank \d, which is at F1\.\d"):
            run(programs)
    programs[1][at[0]], programs[1][at[1]] = first, second
    del programs[0][1]
    for run in (run_blocking, run_fifo):
        with pytest.raises(ValueError, match="F1"):
            run(programs)


def test_a_send_and_a_receive_of_the_same_message_differ() -> None:
    assert Send(1, Action("F", 1, 0)) != Recv(1, Action("F", 1, 0))
    assert str(Send(1, Action("F", 1, 0))) == "F1.0->1"
    assert str(Recv(0, Action("F", 1, 0))) == "F1.0<-0"
