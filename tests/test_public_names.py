"""The public names: each is there, each is loaded when it is first used, and not before."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatree as mt

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", mt.__all__)
def test_a_public_name_is_there(name: str) -> None:
    value = getattr(mt, name)
    assert getattr(value, "__name__", name).rpartition(".")[2] == name


def test_a_type_checker_sees_the_names_that_are_there() -> None:
    """The imports for type checkers and the table of homes say the same."""
    tree = ast.parse((ROOT / "megatree" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.name: node.module if node.module != "megatree" else f"megatree.{alias.name}"
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == mt._HOMES
    assert set(mt.__all__) == set(told)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'megatree' has no attribute 'shart'"):
        mt.shart  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_jax() -> None:
    code = "import sys, megatree; sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
