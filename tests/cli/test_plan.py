"""`megatree plan`: tables, JSON, a page and a diff of what a run will do."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatree.cli.main import main
from megatree.cli.plan import differences

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


def test_a_diff_names_what_changes(capsys) -> None:
    """Two data parallel ranks instead of two tensor parallel ones: other memory, other messages."""
    assert main(["plan", "demo", "--mesh.tp", "1", "--mesh.dp", "2", "--rules.seq-res",
                 "--diff", "demo"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "parameter_bytes" in out
    assert differences({"a": [1, 2]}, {"a": [1, 3]}) == [("a[1]", "2", "3")]
    assert differences({"a": 1}, {"a": 1}) == []


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
    ],
)
def test_what_cannot_be_planned_is_one_message(args, text, capsys) -> None:
    assert main(args) == 2
    assert text in capsys.readouterr().err
