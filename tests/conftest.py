"""The time each suite may take on 2 cores, and what it took. Stated, not enforced: a slow machine
fails no test."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

BUDGET_S = {
    "unit": 180,
    "kernels": 120,
    "integration": 420,
    "faults": 240,
    "simulation": 120,
    "e2e": 240,
}
_spent: Counter[str] = Counter()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed weights are kept for one run of the tests, not with the user's; processes that run
    tests side by side share them."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUIRE_CACHE_DIR", str(base / "packed-weights"))
        yield


def pytest_configure() -> None:
    """A shell starts its background jobs with Ctrl-C ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _spent[Path(report.nodeid).parts[1]] += round(report.duration * 1000)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("time per suite")
    for suite, budget in BUDGET_S.items():
        if _spent[suite]:
            terminalreporter.line(f"{suite}: {_spent[suite] / 1000:.0f} s of {budget} s")
