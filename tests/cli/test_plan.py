"""`megatree plan`: tables, JSON, a page and a diff of what a run will do."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatree.cli.main import main
from megatree.recipes.layout_file import LAYOUT_FIELDS

TINY = ["--train.global-batch", "16", "--train.microbatch", "4"]


def test_a_plan_prints_memory_collectives_and_an_estimate(capsys) -> None:
    assert main(["plan", "demo", *TINY]) == 0
    out = capsys.readouterr().out
    assert "on 2 ranks (dp=1 tp=2), 4 microbatches" in " ".join(out.split())
    assert "memory in MiB" in out
    assert "all_gather" in out
    assert "MFU" in out


def test_json_holds_the_whole_plan(capsys) -> None:
    assert main(["plan", "demo", *TINY, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["num_ranks"] == 2
    assert made["num_microbatches"] == 4
    assert {c["kind"] for c in made["collectives"]} >= {"all_gather", "psum_scatter"}


DATA_PARALLEL = ["--mesh.tp", "1", "--mesh.dp", "2", "--rules.seq-res"]


def diffed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, tuple[str, str]]:
    """Return what a diff says: "part: what" -> (before, after)."""
    assert main(["plan", *args, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    return {f"{r['part']}: {r['what']}": (r["before"], r["after"]) for r in rows}


def test_a_diff_names_what_changes_in_memory_and_collectives(capsys) -> None:
    """Two data parallel ranks instead of two tensor parallel ones: other memory, other messages."""
    found = diffed(capsys, "demo", *DATA_PARALLEL, "--diff", "demo")
    assert found["layout: mesh"] == ("dp=1 tp=2", "dp=2 tp=1")
    assert found["memory: weights (MiB)"] == ("1.8", "3.5")
    assert found["collectives: forward: all"] == ("20 x, 18.02 MiB", "-")
    assert found["collectives: sync embed.table psum(dp)"] == ("-", "1 x, 256 KiB")
    assert not {"layout: ranks", "work: parameters", "work: FLOPs a token"} & set(found)
    back = diffed(capsys, "demo", "--diff", "demo")
    assert back == {}
    assert main(["plan", "demo", *DATA_PARALLEL, "--diff", "demo"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "What changes from demo to this run" in out
    assert "sync embed.table psum(dp) - 1 x, 256 KiB" in out
    assert main(["plan", "demo", "--diff", "demo"]) == 0
    assert "nothing changes" in capsys.readouterr().out


def test_a_layout_is_saved_diffed_and_loaded(tmp_path: Path, capsys) -> None:
    file = str(tmp_path / "layout.json")
    assert main(["plan", "demo", *DATA_PARALLEL, "--save-layout", file]) == 0
    capsys.readouterr()
    assert set(json.loads(Path(file).read_text())) == {*LAYOUT_FIELDS}
    assert diffed(capsys, "demo", "--layout", file, "--diff", file) == {}
    assert diffed(capsys, "demo", "--diff", file)["layout: mesh"] == ("dp=2 tp=1", "dp=1 tp=2")
    # Options after a layout change it.
    both = diffed(capsys, "demo", f"--layout={file}", "--mesh.dp", "4", "--diff", file)
    assert both["layout: mesh"] == ("dp=2 tp=1", "dp=4 tp=1")
    assert main(["explain", "demo", "--layout", file]) == 0
    assert "blocks.dense on dp=2 tp=1" in capsys.readouterr().out


def test_a_run_trains_under_a_saved_layout(tmp_path: Path, monkeypatch, capsys) -> None:
    file = str(tmp_path / "layout.json")
    assert main(["plan", "demo", *DATA_PARALLEL, "--save-layout", file]) == 0
    seen = []
    monkeypatch.setattr("megatree.recipes.start.start", lambda *args, **kwargs: seen.append(args))
    assert main(["train", "demo", "--layout", file, "--train.steps", "3"]) == 0
    ((_, mesh, cfg, *_),) = seen
    assert str(mesh) == "dp=2 tp=1"
    assert cfg.mesh == mesh
    assert cfg.rules["seq_res"] == ()
    assert cfg.train.steps == 3


def test_the_page_is_one_well_formed_file_that_loads_nothing(tmp_path: Path, capsys) -> None:
    file = tmp_path / "plan.html"
    assert main(["plan", "demo", *TINY, "--html", str(file)]) == 0
    text = file.read_text()
    seen: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}

    Parser().feed(text)
    assert {"svg", "table", "pre"} <= set(seen)
    assert "psum_scatter" in text
    assert "http" not in text


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["plan", "demo", "--plot", "x.png"], "this run has no pipeline"),
        (["plan", "demo", "--mesh.pp", "8", "--mesh.tp", "1", "--rules.seq-res"], "4 layers over"),
        (["plan", "demo", "--layout", "no/such.json"], "No such file or directory: 'no/such.json'"),
    ],
)
def test_what_cannot_be_planned_is_one_message(args, text, capsys) -> None:
    assert main(args) == 2
    assert text in capsys.readouterr().err
