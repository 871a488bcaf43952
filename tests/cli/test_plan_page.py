"""The page of `megatree plan --html`, as a browser lays it out and paints it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatree.cli.main import main
from megatree.cli.plan import plan_of
from megatree.cli.plan_page import memory_bars, mesh_picture, over_source, source_files
from megatree.recipes.presets import demo

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
COLOURS = {"w": (58, 110, 165), "g": (127, 176, 105), "o": (230, 162, 60), "a": (179, 80, 110)}
ARGS = [
    "plan", "demo", "--mesh.pp", "2", "--mesh.dp", "2", "--train.microbatch", "8",
    "--train.global-batch", "32",
]  # fmt: skip
# What the page looks like, written into it by itself when it is laid out.
MEASURE = """<script>addEventListener("load", () => {
  const all = (css) => [...document.querySelectorAll(css)];
  const box = (e) => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  document.title = JSON.stringify({
    headings: all("h1, h2").map(e => e.textContent),
    wide: document.documentElement.scrollWidth - innerWidth,
    ranks: all("#mesh rect").map(box), numbers: all("#mesh g rect + text").map(e => e.textContent),
    bars: all(".bar").map(e => [...e.children].map(c => [c.className, ...box(c)])),
    source: all("#source b").map(e => e.textContent.trim()),
    over: all("#source b").map(e => [e.previousElementSibling.className,
      e.getBoundingClientRect().top - e.previousElementSibling.getBoundingClientRect().top]),
    moves: all("pre .move").map(e => getComputedStyle(e).color),
    rows: all("table tr").length,
  });
});</script></head>"""  # noqa: E501


def browser() -> str:
    """Return a Chromium; a test skips without one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium here: none of {', '.join(NAMES)} is a command")
    return found


def chromium(folder: Path, *args: str) -> str:
    """Run Chromium without a window; return what it printed."""
    ran = subprocess.run(
        [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--window-size=1200,2600", f"--user-data-dir={folder / 'profile'}", *args,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return ran.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "plan.html"
    assert main([*ARGS, "--html", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def seen(page: Path) -> dict[str, Any]:
    """What the browser measured."""
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text().replace("</head>", MEASURE))
    dom = chromium(page.parent, "--dump-dom", measured.as_uri())
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    return json.loads(html.unescape(title.group(1)))


def test_a_browser_lays_out_every_part(seen: dict[str, Any]) -> None:
    assert seen["headings"] == [
        "Plan on pp=2 dp=2 tp=2",
        "Mesh",
        "Memory of one rank, by pipeline rank",
        "Where the model communicates (one rank, one step)",
        "Program of blocks.dense",
        "All collectives of one rank, one step",
    ]
    assert seen["wide"] <= 0
    assert seen["moves"] == ["rgb(179, 38, 30)"] * 4
    assert seen["rows"] > 20


def test_the_mesh_is_drawn_rank_by_rank(seen: dict[str, Any]) -> None:
    """Eight boxes with their numbers, beside and below each other, none over another."""
    assert seen["numbers"] == [str(rank) for rank in range(8)]
    boxes = seen["ranks"]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert right - left >= 40
        for other in boxes[i + 1 :]:
            apart = other[0] >= right or other[2] <= left or other[1] >= bottom or other[3] <= top
            assert apart, (i, other)


def test_bars_are_as_long_as_the_memory_they_stand_for(seen: dict[str, Any]) -> None:
    first, second = seen["bars"]
    assert [part[0] for part in first] == ["w", "g", "o", "a"]
    widths = {css: right - left for css, left, _, right, _ in first}
    assert widths["g"] == pytest.approx(widths["w"], rel=0.01)  # float32 gradients of float32
    assert widths["o"] == pytest.approx(2 * widths["w"], rel=0.01)  # two moments
    assert sum(right - left for _, left, _, right, _ in second) < sum(widths.values())


def test_collectives_stand_over_the_lines_that_ask_for_them(seen: dict[str, Any]) -> None:
    assert 'y = shard(y, "batch seq_res embed")' in seen["source"]
    assert len(seen["source"]) >= 4
    for kind, below in seen["over"]:
        assert kind in ("forward", "backward")
        assert below > 10


def test_a_browser_paints_the_page(page: Path) -> None:
    """Pixels of every part of a bar, in the proportion of the bytes."""
    image = pytest.importorskip("matplotlib.image")
    picture = page.with_name("page.png")
    chromium(page.parent, f"--screenshot={picture}", page.as_uri())
    pixels = (image.imread(picture)[..., :3] * 255).round()
    painted = {css: int((pixels == colour).all(-1).sum()) for css, colour in COLOURS.items()}
    assert min(painted.values()) > 1000, painted
    assert painted["o"] == pytest.approx(2 * painted["w"], rel=0.1)


def test_only_a_part_of_a_large_mesh_is_drawn() -> None:
    drawn = mesh_picture([("pp", 8), ("dp", 256), ("tp", 8)])
    assert drawn.count("<rect") == 4 * 8 * 8
    assert "pp 8 x dp 256 x tp 8 (256 of 16,384 ranks are drawn)" in drawn
    assert ">2048<" in drawn  # the first rank of the second grid
    assert mesh_picture([]).count("<rect") == 1


def test_source_lines_are_those_of_the_model() -> None:
    made = plan_of(demo())
    from megatree.recipes.build import model_of

    files = source_files(model_of(demo()))
    assert list(files) == ["models/gpt.py"]
    text = over_source(made, files)
    lines = [c.source for c in made.collectives if c.phase == "forward"]
    assert all(line in text for line in lines)
    assert over_source(made, {}) == "<p>Nowhere.</p>"
    assert memory_bars(made.stages).count("class='bar'") == 1
