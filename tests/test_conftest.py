"""Skips for missing data must turn into failures where the data has to be there."""

from pathlib import Path

import pytest

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
