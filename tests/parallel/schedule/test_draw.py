"""Pictures show every action where it happens, and stay small for large schedules."""

import importlib
from pathlib import Path

import pytest

from megatree.parallel.schedule import (
    Costs,
    draw,
    gpipe,
    interleaved,
    one_f_one_b,
    plot,
    timeline,
    zero_bubble_h1,
    zero_bubble_v,
)


def test_a_split_schedule_is_drawn_action_by_action() -> None:
    assert draw(timeline(zero_bubble_h1(3, 3))).splitlines() == [
        "rank 0 |F0 F1 F2 .. .. B0 W0 B1 W1 B2 W2 |",
        "rank 1 |.. F0 F1 .. B0 F2 B1 W0 B2 W1 W2 |",
        "rank 2 |.. .. F0 B0 F1 B1 F2 B2 W0 W1 W2 |",
        "3 stages on 3 ranks, 3 microbatches: makespan 11, bubble 18.2%, "
        "live microbatches at most 3",
    ]


def test_virtual_stages_and_durations_show() -> None:
    costs = Costs(forward=0.5, input_grad=0.25, weight_grad=0.25)
    picture = draw(timeline(interleaved(2, 2, 2), costs))
    assert picture.splitlines()[0] == (
        "rank 0 |F0.0 F0.1 F2.0 F2.1 .... B2.0 .... B2.1 B0.0 B0.1 |"
    )


def test_every_action_appears_once_over_all_panels() -> None:
    for schedule in [interleaved(4, 8, 2), zero_bubble_v(3, 6)]:
        picture = draw(timeline(schedule))
        assert picture.count("from ") > 1
        rows: dict[str, str] = {}
        for line in picture.splitlines():
            if line.startswith("rank"):
                head, _, body = line.partition("|")
                rows[head] = rows.get(head, "") + body.removesuffix("|")
        assert max(map(len, picture.splitlines()[:-1])) <= 100
        for row, actions in zip(rows.values(), schedule.ranks, strict=True):
            words = [word.rstrip("-") for word in row.split()]
            assert [word for word in words if word.strip(".")] == [str(a) for a in actions]


def test_a_large_timeline_is_scaled_to_one_panel() -> None:
    picture = draw(timeline(one_f_one_b(60, 100)), width=80)
    lines = picture.splitlines()
    assert len(lines) == 32 + 1 + 1
    assert {len(line) for line in lines[:-1] if line != "..."} == {80}
    assert lines[0].startswith("rank  0 |F")
    assert set("".join(line[9:] for line in lines[:-1])) <= set("FB.|")


def test_zero_durations_and_no_time_at_all_are_drawn() -> None:
    nothing = Costs(forward=0.0, input_grad=0.0, weight_grad=0.0)
    assert "makespan 0, bubble 0.0%" in draw(timeline(gpipe(2, 2), nothing))
    assert "F1" not in draw(timeline(gpipe(1, 2), Costs(forward=0.0)))


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(timeline(zero_bubble_v(4, 8)), tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"plot: matplotlib is not installed. Run `pip install"):
        plot(timeline(gpipe(2, 2)), tmp_path / "timeline.png")
    assert not (tmp_path / "timeline.png").exists()


def test_the_readmes_timeline_is_what_draw_prints() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert f"```\n{draw(timeline(zero_bubble_h1(4, 8)))}\n```" in readme
