"""Skips for missing data must turn into failures where it has to be there; types are checked."""

import sys
from pathlib import Path

import jaxtyping
import pytest

from megatree.io.checkpoint import box

SKIPS = """
import pytest

def test_by_fixture(shared):
    pass

def test_by_call():
    pytest.skip("missing data: nothing here")

@pytest.mark.skipif(True, reason="missing data: by mark")
def test_by_mark():
    pass

def test_other():
    pytest.skip("needs a network")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("MEGATREE_SHARED", str(pytester.path / "absent"))
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(
        test_functions=SKIPS,
        test_module='import pytest\npytest.skip("missing data: all", allow_module_level=True)',
    )
    return pytester


def test_tests_without_data_skip_by_name(suite: pytest.Pytester) -> None:
    result = suite.runpytest("-rs")
    result.assert_outcomes(skipped=5)
    result.stdout.fnmatch_lines(["*missing data: *absent is no folder. Set MEGATREE_SHARED*"])


def test_require_data_fails_only_skips_for_missing_data(suite: pytest.Pytester) -> None:
    result = suite.runpytest("--require-data", "--continue-on-collection-errors")
    result.assert_outcomes(failed=1, errors=3, skipped=1)  # a skip in set-up is an error
    assert result.ret != 0


def test_shapes_are_checked_wherever_they_are_stated_and_types_everywhere() -> None:
    """By who loads a module: jaxtyping, which binds the names of dims, or beartype alone."""
    root = Path(box.__file__).parents[2]
    files = sorted((root / "io").rglob("*.py"))
    for file in files:
        at = file.parent if file.stem == "__init__" else file.with_suffix("")
        name = ".".join(at.relative_to(root.parent).parts)
        found = (finder.find_spec(name, [str(at.parent)]) for finder in sys.meta_path)
        by = type(next(spec for spec in found if spec is not None).loader).__module__.split(".")[0]
        shaped = "jaxtyping" in file.read_text(encoding="utf-8")
        assert by == "jaxtyping" or (by == "beartype" and not shaped), name
    assert len(files) > 80
    with pytest.raises(jaxtyping.TypeCheckError):
        box.volume("a box")  # type: ignore[arg-type]
