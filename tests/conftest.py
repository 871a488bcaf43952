"""Every test: one torch thread, drawn examples that repeat, and shared data that may be absent."""

import os
from collections.abc import Generator
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch
from beartype import BeartypeConf
from beartype.claw import beartype_package

torch.set_num_threads(1)
if not torch.cuda.is_available():  # read when Triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"
hypothesis.settings.register_profile("megatree", deadline=None, derandomize=True)
hypothesis.settings.load_profile("megatree")

# Annotations of megatree.io are checked at every call; installed before its import. jaxtyping is
# slow at it, and only there where shapes are stated; elsewhere beartype alone sees as much.
SHAPED = ("megatree.io.corpus", "megatree.io.data", "megatree.io.preprocess")
CALLS = BeartypeConf(claw_is_pep526=False, violation_type=jaxtyping.TypeCheckError)
jaxtyping.install_import_hook(SHAPED, "beartype.beartype")
beartype_package("megatree.io", conf=CALLS)

MISSING = "missing data:"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --require-data."""
    parser.addoption(
        "--require-data",
        action="store_true",
        help=f"fail, rather than skip, a test whose reason to skip starts with '{MISSING}'",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Apply --require-data to a test."""
    report = yield
    _require_data(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Apply --require-data to a module."""
    report = yield
    _require_data(collector.config, report)
    return report


def _require_data(config: pytest.Config, report: pytest.TestReport | pytest.CollectReport) -> None:
    if not (report.skipped and config.getoption("--require-data")):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if reason.removeprefix("Skipped: ").startswith(MISSING):
        report.outcome = "failed"
        report.longrepr = f"{reason} (a failure under --require-data)"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data beside the clone, or at MEGATREE_SHARED; a test skips without it."""
    folder = Path(os.environ.get("MEGATREE_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{MISSING} {folder} is no folder. Set MEGATREE_SHARED to where it is.")
    return folder
