"""Schedules written by hand as text come back as they were, or are refused at the cell."""

import pytest

from megatree.parallel.schedule import (
    Action,
    from_csv,
    from_rows,
    interleaved,
    one_f_one_b,
    validate,
    zero_bubble_h1,
    zero_bubble_v,
)


@pytest.mark.parametrize(
    "schedule",
    [one_f_one_b(3, 4), interleaved(2, 4, 3), zero_bubble_h1(3, 3), zero_bubble_v(3, 4)],
    ids=["1f1b", "interleaved", "zb-h1", "zb-v"],
)
def test_text_comes_back_as_the_schedule(schedule: object) -> None:
    assert from_csv(str(schedule)) == schedule


def test_empty_cells_comments_and_blank_lines_mean_nothing() -> None:
    text = """
    # two ranks, one microbatch
    F0.0,     ,      , B0.0

        , F1.0, B1.0,
    """
    assert from_csv(text) == one_f_one_b(2, 1)


def test_rows_take_actions_and_text() -> None:
    schedule = from_rows([["F0.0", Action("B", 0, 0)], [Action("F", 1, 0), " B1.0 "]])
    assert schedule == one_f_one_b(2, 1)
    validate(schedule)


@pytest.mark.parametrize("cell", ["F1", "f1.0", "X1.0", "F1.0.0", "F-1.0", "F1,0x", "0F1"])
def test_a_cell_that_is_no_action_is_marked(cell: str) -> None:
    with pytest.raises(ValueError, match="is no action") as error:
        from_rows([["F0.0", "B0.0"], ["F1.0", cell]])
    first, rank0, rank1 = str(error.value).splitlines()
    assert first == (
        f"schedule: {cell!r} at place 1 of rank 1 is no action. Write F, B or W, a stage and a "
        f"microbatch: F0.0."
    )
    assert rank0.split() == ["rank", "0", "|", "F0.0", "B0.0"]
    assert rank1.split() == ["rank", "1", "|", "F1.0", f"[{cell}]"]


def test_a_stage_in_two_rows_is_marked() -> None:
    with pytest.raises(
        ValueError, match=r"B0\.0 at place 1 of rank 1 is of a stage that rank 0 runs"
    ):
        from_csv("F0.0\nF1.0, B0.0, B1.0")


def test_a_gap_in_the_stages_is_named() -> None:
    with pytest.raises(ValueError, match="no row names stage 1, but there are 2 stages up to 2"):
        from_csv("F0.0, B0.0\nF2.0, B2.0")


@pytest.mark.parametrize("text", ["", "# nothing", ",,"])
def test_text_without_an_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no row names an action\. Write one row per rank"):
        from_csv(text)
