"""A config comes back from its JSON as it was, and a damaged one is refused by field."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatree.recipes.config import MeshConfig, megatron_rules
from megatree.recipes.presets import RECIPES, demo
from megatree.recipes.saved import differences, from_plain, load_config, to_json, to_plain


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_back_equal(name: str, tmp_path: Path) -> None:
    cfg = RECIPES[name]()
    (tmp_path / "config.json").write_text(to_json(cfg), encoding="utf-8")
    assert load_config(tmp_path / "config.json") == cfg


def test_none_and_odd_floats_come_back() -> None:
    cfg = demo()
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, clip=None, lr=0.1 + 0.2))
    assert from_plain(json.loads(to_json(cfg))) == cfg


def broken(path: str, value: Any) -> dict[str, Any]:
    plain = to_plain(demo())
    *groups, field = path.split(".")
    table = plain
    for group in groups:
        table = table[group]
    if value is None:
        del table[field]
    else:
        table[field] = value
    return plain


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.lrr", 0.1, r"config.optimizer: no field 'lrr' \(did you mean 'lr'\?\)"),
        ("optimizer.lr", None, r"config.optimizer: lacks lr\. Add what is missing"),
        ("optimizer.lr", "fast", r"config.optimizer.lr: 'fast' is str\. Give float"),
        ("optimizer.betas", [0.9], r"config.optimizer.betas: 1 values\. Give 2"),
        ("train.steps", True, r"config.train.steps: True is bool\. Give int"),
        ("train.steps", 1.5, r"config.train.steps: 1.5 is float\. Give int"),
        (
            "dtype",
            "float12",
            r"config.dtype: 'float12'\. Use one of float32, bfloat16, float16, float64",
        ),
        ("rules.ffn", "tp", r"config.rules.ffn: 'tp' is str\. Give list"),
        ("model", 3, r"config.model: 3 is int\. Give dict"),
        ("mesh.tp", 1, r"rules.seq_res: cut by tp, which has one rank"),
    ],
)
def test_a_damaged_config_is_refused_by_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_plain(broken(path, value))


def test_no_json_is_refused_by_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json: no JSON \(.*\)\. Give a saved config.json"):
        load_config(tmp_path / "config.json")


def test_differences_name_dotted_fields_with_both_values() -> None:
    old = demo()
    new = replace(old, mesh=MeshConfig(dp=2), rules=megatron_rules())
    assert differences(old, new) == {
        "mesh.dp": (1, 2),
        "mesh.tp": (2, 1),
        "rules.seq_res": (["cp", "tp"], ["cp"]),
    }
    assert differences(old, old) == {}
