"""The layout of a run is data of its own: saved, read under another model, refused by field."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatree.recipes.config import MeshConfig, PipelineConfig, RunConfig
from megatree.recipes.layout_file import LAYOUT_FIELDS, is_layout, save_layout, with_layout
from megatree.recipes.presets import demo, llama_1b, llama_7b
from megatree.recipes.saved import to_json


def test_a_layout_goes_to_another_run_and_brings_nothing_else(tmp_path: Path) -> None:
    pipeline = PipelineConfig(schedule="interleaved", virtual=2)
    cut = replace(llama_7b(), mesh=MeshConfig(pp=2, dp=4, tp=4), pipeline=pipeline)
    save_layout(cut, tmp_path / "layout.json")
    got = with_layout(llama_1b(), tmp_path / "layout.json")
    assert (got.mesh, got.rules, got.pipeline) == (cut.mesh, cut.rules, cut.pipeline)
    layout = {name: getattr(llama_1b(), name) for name in LAYOUT_FIELDS}
    assert replace(got, **layout) == llama_1b()


def test_the_config_of_a_run_is_a_layout_too(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(to_json(llama_7b()))
    assert with_layout(llama_1b(), path).mesh == llama_7b().mesh
    assert with_layout(llama_1b(), path).model == llama_1b().model
    assert not is_layout(path)
    save_layout(llama_7b(), path)
    assert is_layout(path)


def test_every_field_of_a_run_is_layout_or_is_not() -> None:
    """A new field of RunConfig must say which: a layout without it would lose how a run is cut."""
    others = {"model", "data", "optimizer", "precision", "train", "checkpoint", "dtype", "compile"}
    others |= {"health", "log", "deterministic", "cuda_graphs"}
    assert {field.name for field in fields(RunConfig)} == others | set(LAYOUT_FIELDS)


def test_a_part_of_a_layout_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps({"mesh": {"dp": 2, "tp": 2}}))
    got = with_layout(demo(), path)
    assert got.mesh == MeshConfig(dp=2, tp=2)
    assert got.rules == demo().rules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "layout.json: no JSON \\(.*\\). Give a saved layout"),
        ("[]", "layout.json: list. Give a saved layout, an object"),
        ("{}", "layout.json: no layout. Give mesh, rules, pipeline, context"),
        ('{"mash": {}}', r"no field 'mash' \(did you mean 'mesh'\?\)\. A layout has mesh, rules"),
        ('{"mesh": {"tq": 2}}', r"layout.json.mesh: no field 'tq'"),
        ('{"mesh": {"tp": 1}}', r"rules.seq_res: cut by tp, which has one rank"),
        ('{"mesh": {"dp": 5, "tp": 2}}', r"train.microbatch: 16 sequences do not divide over 5"),
    ],
)
def test_a_wrong_layout_is_refused_by_field(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        with_layout(demo(), tmp_path / "layout.json")
